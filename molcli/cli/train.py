"""`molcli train`: recover what the conversion lost, or train from scratch."""

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
    data_for,
    recipe_for,
)
from molcli.cli.parents import open_dense
from molcli.config.sections import Data as DataSpec
from molcli.config.sections import Recipe
from molcli.errors import MolError

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
    text = data_for(data) or settings.train.data
    if text is None:
        raise MolError(
            "there is nothing to train on",
            allowed="--data SOURCE, or train.data in the recipe",
            hint="molcli data sample PARENT text.jsonl draws text from the parent",
        )
    dense = None if parent is None else open_dense(parent)
    run_train(checkpoint, out, text, settings, dense, resume=resume)
    typer.echo(f"Trained model in {out}")


def run_train(
    checkpoint: Path,
    out: Path,
    data: DataSpec,
    recipe: Recipe,
    parent: "DenseParent | None",
    *,
    resume: bool = False,
) -> None:
    """Trains under a bar; towards the parent's predictions if there is one."""
    from molcli.stages.train import train as run

    with bar("training") as progress:
        run(checkpoint, out, data, recipe, parent, resume, progress=progress)
