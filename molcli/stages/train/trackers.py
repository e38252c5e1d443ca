"""Trackers show the log elsewhere: TensorBoard, Weights & Biases, Trackio; through accelerate."""

import re
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
from molcli.files.json_files import read_object, shortened, write_object

_TRACKED = (  # fields of a line
    *("loss", "ce", "kl", "balance", "learning_rate", "gradient_norm"),
    *("tokens", "tokens_per_second", "mfu", "skipped"),
)
_PROJECT = "molcli"  # in every tracker
_RUN = "tracked.json"  # in the output folder: the run's name in all trackers
_RUN_NAME = re.compile(r".{0,255}-[0-9a-f]{8}")


def check_trackers(config: TrainConfig) -> None:
    """Check that the packages of all trackers are installed.

    Raises:
        MolError: if one is not.
    """
    installed = {kind.value for kind in get_available_trackers()}
    for name in config.trackers:  # each is named as its package
        if name not in installed:
            raise MolError(
                f"`train.trackers` names {name}, and the package {name} is not installed",
                allowed="trackers whose packages are installed",
                hint=f"pip install {name}",
            )


@contextmanager
def open_trackers(
    accelerator: Accelerator, config: TrainConfig, out: Path, steps: int
) -> Iterator[None]:
    """Start config.trackers on the main rank, and close them at the end, on errors, too.

    Args:
        accelerator: holds the trackers.
        config: the train section.
        out: folder of the run.
        steps: done. Where a run in `out` went further, TensorBoard drops the later steps; the other
            trackers keep them, and the repeated steps give the same values.

    Raises:
        MolError: for a tracker that cannot be started.
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
    for tracker in ("wandb", "trackio"):
        options[tracker]["config"] = asdict(config)
    try:
        accelerator.init_trackers(_PROJECT, init_kwargs=options)
    except Exception as error:  # of any of the packages: no login, no network, no space
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


def send_to_trackers(accelerator: Accelerator, line: dict[str, Any]) -> None:
    """Send the figures of a line of the log to all open trackers."""
    values = {key: line[key] for key in _TRACKED if line[key] is not None}
    for tracker in accelerator.trackers:
        tracker.log(values, step=line["step"])


def _run_name(out: Path) -> str:
    """The same for a run and its resumptions, another one for the next run in a folder."""
    path = out / _RUN
    if path.is_file():
        hint = f"move {path} elsewhere: the trackers then show a new run"
        content = read_object(
            path, {"run": str}, allowed="the file as training wrote it", hint=hint
        )
        name: str = content["run"]
        if not _RUN_NAME.fullmatch(name):
            raise MolError(f"{path} has run: {shortened(name)}", hint=hint)
        return name
    name = f"{out.resolve().name}-{secrets.token_hex(4)}"
    write_object(path, {"run": name})
    return name
