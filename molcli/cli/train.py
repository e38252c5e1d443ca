"""`molcli train`: recover what the conversion lost, or train from scratch."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molcli.cli.bars import bar
from molcli.cli.options import (
    Checkpoint,
    Data,
    Out,
    Overrides,
    ParentOption,
    RecipeName,
    recipe_for,
)
from molcli.cli.parents import open_dense
from molcli.config.sections import Recipe, TrainConfig
from molcli.errors import Interrupted, MolError

if TYPE_CHECKING:  # torch comes with it
    from molcli.io.parent import Parent as DenseParent

Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last checkpoint of a stopped run in OUT.")
]


def train(
    checkpoint: Checkpoint,
    out: Out,
    data: Data = None,
    parent: ParentOption = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Train a Mixture of Layers model.

    With --parent, towards its predictions (train.kl_weight); without, on the text alone.
    Without --recipe, the recipe saved in CKPT counts.
    """
    settings = recipe_for(recipe, overrides, checkpoint)
    _refuse_without_data(settings.train, data)
    dense = None if parent is None else open_dense(parent)
    try:
        run_train(checkpoint, out, data, settings, dense, resume=resume)
    except Interrupted as stop:
        stop.resume = _resume_command()
        raise
    typer.echo(f"Trained model in {out}")


def run_train(
    checkpoint: Path,
    out: Path,
    data: str | None,
    recipe: Recipe,
    parent: "DenseParent | None",
    *,
    resume: bool = False,
) -> None:
    """Trains under a bar; towards the parent's predictions if there is one."""
    from molcli.stages.train import train as run

    with bar("training") as progress:
        run(checkpoint, out, data, recipe, parent, resume, progress=progress)


def _refuse_without_data(config: TrainConfig, data: str | None) -> None:
    """Raises MolError if a stage has nothing to train on."""
    stages = config.stages if isinstance(config.stages, list) else [config]
    if data is None and config.data is None and any(stage.data is None for stage in stages):
        raise MolError(
            "there is nothing to train on",
            allowed="--data FILE, or train.data in the recipe",
            hint="molcli sample PARENT text.jsonl draws text from the parent",
        )


def _resume_command() -> str:
    """This very command, with --resume."""
    words = ["molcli", *(word for word in sys.argv[1:] if word != "--resume"), "--resume"]
    ranks = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun started this process
    launcher = [] if ranks is None else ["torchrun", f"--nproc-per-node={ranks}", "--no-python"]
    return shlex.join(launcher + words)
