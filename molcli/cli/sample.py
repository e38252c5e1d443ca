"""`molcli sample`: text drawn from the parent."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molcli.cli.bars import bar
from molcli.cli.options import Overrides, Parent, RecipeName, recipe_for
from molcli.cli.parents import open_dense
from molcli.config.sections import SampleConfig

if TYPE_CHECKING:  # torch comes with it
    from molcli.io.parent import Parent as DenseParent

SampleFile = Annotated[Path, typer.Argument(metavar="OUT", help="The .jsonl file to write.")]


def sample(
    parent: Parent, out: SampleFile, recipe: RecipeName = None, overrides: Overrides = None
) -> None:
    """Sample text from the parent, for those without a data set."""
    run_sample(open_dense(parent), recipe_for(recipe, overrides).sample, out)
    typer.echo(f"Text in {out}")


def run_sample(parent: "DenseParent", settings: SampleConfig, out: Path) -> None:
    """Writes text drawn from the parent, under a bar."""
    from molcli.stages.sample import sample as draw

    with bar("sampling") as progress:
        draw(parent, settings, out, progress=progress)
