"""`molcli data sample`: text drawn from the parent."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molcli.cli.bars import bar
from molcli.cli.options import Overrides, Parent, RecipeName, recipe_for
from molcli.cli.parents import open_dense
from molcli.config.sections import SampleConfig

if TYPE_CHECKING:  # torch comes with it
    from molcli.families.parent import Parent as DenseParent

SampleFile = Annotated[Path, typer.Argument(metavar="OUT", help="The .jsonl file to write.")]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="SOURCE",
        help="Prompts to go on from, read as --data is; without, the parent begins from its BOS.",
    ),
]


def sample(
    parent: Parent,
    out: SampleFile,
    prompts: Prompts = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
) -> None:
    """Sample text from the parent, for those without a data set."""
    settings = recipe_for(recipe, overrides).sample
    if prompts is not None:
        settings = replace(settings, prompts=prompts)
    run_sample(open_dense(parent), settings, out)
    typer.echo(f"Text in {out}")


def run_sample(parent: "DenseParent", settings: SampleConfig, out: Path) -> None:
    """Writes text drawn from the parent, under a bar."""
    from molcli.stages.sample import sample as draw

    with bar("sampling") as progress:
        draw(parent, settings, out, progress=progress)
