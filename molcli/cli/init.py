"""`molcli init`: write an untrained Mixture of Layers model."""

from typing import Annotated

import typer

from molcli.cli.options import Out, Overrides, complete_recipe, recipe_for
from molcli.console import say
from molcli.report.bars import bar

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A .yaml file, or the name of a bundled recipe; its section `model` is used.",
        autocompletion=complete_recipe,
    ),
]


def init(recipe: RecipeArgument, out: Out, overrides: Overrides = None) -> None:
    """Write an untrained checkpoint, such as those of the paper."""
    settings = recipe_for(recipe, overrides)
    from molcli.stages.init import init as write

    with bar("initialising") as progress:
        write(settings, out)
        progress(1, 1)
    say(f"Untrained model in {out}")
