"""`molcli sample`: text drawn from the parent."""

from pathlib import Path
from typing import Annotated

import typer

from molcli.cli.bars import bar
from molcli.cli.options import Overrides, Parent, RecipeName, recipe_for
from molcli.cli.parents import open_dense

SampleFile = Annotated[Path, typer.Argument(metavar="OUT", help="The .jsonl file to write.")]


def sample(
    parent: Parent, out: SampleFile, recipe: RecipeName = None, overrides: Overrides = None
) -> None:
    """Sample text from the parent, for those without a data set."""
    settings = recipe_for(recipe, overrides).sample
    from molcli.stages.sample import sample as draw

    dense = open_dense(parent)
    with bar("sampling") as progress:
        draw(dense, settings, out, progress=progress)
    typer.echo(f"Text in {out}")
