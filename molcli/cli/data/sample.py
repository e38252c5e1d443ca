"""`molcli data sample`: write text sampled from the parent."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molcli import api
from molcli.cli.options import Overrides, Parent, RecipeName

if TYPE_CHECKING:  # these import torch or a YAML parser
    from molcli.config.sections import SampleConfig
    from molcli.families.parent import Parent as DenseParent

SampleFile = Annotated[
    Path, typer.Argument(metavar="OUT", help="The .jsonl file to write; must not exist.")
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="SOURCE",
        help="Texts that the parent continues, read as --data is; without, it begins at its BOS.",
    ),
]


def sample(
    parent: Parent,
    out: SampleFile,
    prompts: Prompts = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
) -> None:
    """Sample text from the parent, for use where there is no data set."""
    values: dict[str, Any] = {} if prompts is None else {"prompts": prompts}
    api.sample(parent, out, recipe=recipe, settings=overrides or (), **values)
    typer.echo(f"Text in {out}")


def run_sample(parent: "DenseParent", settings: "SampleConfig", out: Path) -> None:
    """For `molcli demo`."""
    from molcli.config.sections import Recipe

    api.sample(parent, out, recipe=Recipe(sample=settings))
