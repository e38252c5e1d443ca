"""`molcli init`: an untrained Mixture of Layers model."""

from typing import Annotated

import typer

from molcli.cli.bars import bar
from molcli.cli.options import Out, Overrides, complete_recipe

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A .yaml file, or the name of a bundled recipe; its section `model` counts.",
        autocompletion=complete_recipe,
    ),
]


def init(recipe: RecipeArgument, out: Out, overrides: Overrides = None) -> None:
    """Make an untrained checkpoint, such as those of the paper."""
    from molcli.config.recipe import load_recipe

    settings = load_recipe(recipe, overrides or ())
    from molcli.stages.init import init as write

    with bar("initialising") as progress:
        write(settings, out)
        progress(1, 1)
    typer.echo(f"Untrained model in {out}")
