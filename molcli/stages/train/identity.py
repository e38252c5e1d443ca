"""What makes two runs the same run, so that one may go on from the other's checkpoint."""

import json
from dataclasses import asdict, replace
from typing import Any

from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage, section
from molcli.errors import MolError
from molcli.stages.train.state import Checkpoint

DATA = "the data"  # of the stage at hand: its rows' fingerprint
# What may differ between a run and its resumption: it changes nothing that is trained, or only the
# order of sums, as another number of processes or compiled code does (and over how many rows CV^2
# is taken).
_FREE_SETTINGS = (
    *("data", "logits", "checkpoint_every", "log_every", "max_skipped", "trackers"),
    *("micro_batch_size", "gradient_checkpointing", "compile", "sharding"),
)


def run_identity(
    config: TrainConfig, stages: list[Stage], *, checkpoint: str, parent: str
) -> dict[str, Any]:
    """What a resumed run must share with the one that it continues, as plain JSON values.

    checkpoint, parent: fingerprints of the two models; the parent's may be its cached logits'.
    """
    identity: dict[str, Any] = {"the checkpoint": checkpoint, "the parent": parent}
    for number, stage in enumerate(stages):
        name = section(config, number)
        identity[f"`{name}.kind`"] = stage.kind
        settings = asdict(replace(stage.settings, stages=None))
        identity |= {f"`{name}.{k}`": v for k, v in settings.items() if k not in _FREE_SETTINGS}
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def refuse_another_run(checkpoint: Checkpoint, now: dict[str, Any]) -> None:
    """Raises MolError if the checkpoint belongs to another recipe, model or parent; with the key
    `DATA` in `now`, or to other data."""
    then = checkpoint.identity
    keys = [key for key in {**then, **now} if key != DATA or DATA in now]
    changed = [key for key in keys if then.get(key) != now.get(key)]
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
