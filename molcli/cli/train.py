"""`molcli train`: recover what the conversion lost, or train from scratch."""

from dataclasses import replace
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

Logits = Annotated[
    str | None,
    typer.Option(
        "--logits",
        metavar="DIR",
        help="A folder of `molcli data cache-logits`, in place of --data and --parent.",
    ),
]


def train(
    checkpoint: Checkpoint,
    out: Out,
    data: Data = None,
    parent: ParentOption = None,
    logits: Logits = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Train a Mixture of Layers model.

    With --parent or --logits, towards the parent's predictions (train.kl_weight); without, on the
    text alone.
    Without --recipe, the recipe saved in CKPT counts.
    """
    settings = recipe_for(recipe, overrides, checkpoint)
    text = data_for(data)
    if logits is not None and (text is not None or parent is not None):
        raise MolError(
            "--logits comes with its own text and predictions",
            allowed="--logits alone, or --data with or without --parent",
        )
    if logits is not None or text is not None:
        settings = replace(settings, train=replace(settings.train, data=text, logits=logits))
    text = settings.train.data
    if settings.train.logits is not None and parent is not None:
        raise MolError(
            "`train.logits` is set, and there is a --parent", hint="--set train.logits=null"
        )
    if text is None and settings.train.logits is None:
        raise MolError(
            "there is nothing to train on",
            allowed="--data SOURCE, --logits DIR, or train.data in the recipe",
            hint="molcli data sample PARENT text.jsonl draws text from the parent",
        )
    dense = None if parent is None else open_dense(parent)
    run_train(checkpoint, out, text, settings, dense, resume=resume)
    typer.echo(f"Trained model in {out}")


def run_train(
    checkpoint: Path,
    out: Path,
    data: DataSpec | None,
    recipe: Recipe,
    parent: "DenseParent | None",
    *,
    resume: bool = False,
) -> None:
    """Trains under a bar; towards a parent's predictions if it or its cached logits are there."""
    from molcli.stages.train import train as run

    with bar("training") as progress:
        run(checkpoint, out, data, recipe, parent, resume, progress=progress)
