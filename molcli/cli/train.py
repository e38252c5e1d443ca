"""`molcli train`: recover what the conversion lost, or train from scratch."""

from typing import Annotated

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
from molcli.errors import MolError

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
    text = data if data is not None else settings.train.data
    if text is None:
        raise MolError(
            "there is nothing to train on",
            allowed="--data FILE, or train.data in the recipe",
            hint="molcli sample PARENT text.jsonl draws text from the parent",
        )
    from molcli.stages.train import train as run

    dense = None if parent is None else open_dense(parent)
    with bar("training") as progress:
        run(checkpoint, out, text, settings, dense, resume, progress=progress)
    typer.echo(f"Trained model in {out}")
