"""What makes two runs the same run, so that one may go on from the other's checkpoint."""

import json
from dataclasses import asdict
from typing import Any

from molcli.config.sections import TrainConfig
from molcli.errors import MolError
from molcli.stages.train.state import Checkpoint

# What may differ between a run and its resumption: it changes nothing that is trained, or the order
# of sums alone, as another number of processes does.
_FREE_SETTINGS = (
    *("data", "checkpoint_every", "log_every", "max_skipped"),
    *("micro_batch_size", "gradient_checkpointing"),
)


def run_identity(config: TrainConfig, *, data: str, checkpoint: str, parent: str) -> dict[str, Any]:
    """What a resumed run must share with the one that it continues, as plain JSON values.

    data, checkpoint, parent: fingerprints of the packed rows and of the two models.
    """
    settings = {f"`train.{k}`": v for k, v in asdict(config).items() if k not in _FREE_SETTINGS}
    identity = {**settings, "the data": data, "the checkpoint": checkpoint, "the parent": parent}
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def refuse_another_run(checkpoint: Checkpoint, now: dict[str, Any]) -> None:
    """Raises MolError if the checkpoint belongs to another recipe, data set, model or parent."""
    then = checkpoint.identity
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if changed:
        what = "; ".join(
            f"{key} was {then.get(key)} and is {now.get(key)}"
            if key.startswith("`")
            else f"{key} was another one"
            for key in changed
        )
        raise MolError(
            f"{checkpoint.folder} belongs to another run: {what}",
            allowed="the recipe, data, checkpoint and parent that the run began with",
            hint="the same command as before with --resume, or another output folder",
        )
