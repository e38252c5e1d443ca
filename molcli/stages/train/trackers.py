"""What shows a run elsewhere: TensorBoard, Weights & Biases, Trackio, through accelerate."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from molcli.config.sections import TrainConfig
from molcli.errors import MolError

_PROJECT = "molcli"
_RUN = "tracked.json"  # in the output folder: the run's name in all trackers
# Of a log line, what has a curve.
_CURVES = (
    *("loss", "ce", "kl", "balance", "learning_rate", "gradient_norm", "tokens"),
    *("tokens_per_second", "mfu", "skipped"),
)


def check_trackers(config: TrainConfig) -> None:
    """Raises MolError for a tracker whose package is not installed."""
    installed = {kind.value for kind in get_available_trackers()}
    for name in config.trackers:  # each is named as its package
        if name not in installed:
            raise MolError(
                f"`train.trackers` names {name}, and the package {name} is not installed",
                allowed="trackers whose packages are installed",
                hint=f"pip install {name}",
            )


@contextmanager
def tracked(accelerator: Accelerator, config: TrainConfig, out: Path, steps: int) -> Iterator[None]:
    """While entered, `show` reaches config.trackers; they are closed whatever happens.

    steps: done. Where the folder `out` holds a run that went further, TensorBoard forgets the rest;
    the others keep it, which is what the steps that are done again will give. Raises MolError for a
    tracker that cannot be started.
    """
    if not config.trackers or not accelerator.is_main_process:
        yield
        return
    name = _run_name(out)
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": steps + 1},
        "wandb": {"id": name, "name": name, "resume": "allow", "dir": str(out)},
        "trackio": {"name": name, "resume": "allow"},
    }
    for which in ("wandb", "trackio"):
        options[which]["config"] = asdict(config)
    try:
        accelerator.init_trackers(_PROJECT, init_kwargs=options)
    except Exception as error:  # of whichever package: no login, no network, no room
        raise MolError(
            f"the trackers {', '.join(config.trackers)} could not be started: {error}",
            allowed="trackers that work here; log.jsonl and train.html are always written",
            hint="the same command with --resume --set train.trackers=[]",
        ) from error
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []


def show(accelerator: Accelerator, line: dict[str, Any]) -> None:
    """Sends what has a curve in a line of the log."""
    values = {key: line[key] for key in _CURVES if line[key] is not None}
    for tracker in accelerator.trackers:
        tracker.log(values, step=line["step"])


def _run_name(out: Path) -> str:
    """The same for a run and its resumptions, another one for the next run in a folder."""
    path = out / _RUN
    if path.is_file():
        name: str = json.loads(path.read_text())["run"]
        return name
    name = f"{out.resolve().name}-{secrets.token_hex(4)}"
    path.write_text(json.dumps({"run": name}))
    return name
