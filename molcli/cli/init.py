"""`molcli init`: write an untrained Mixture of Layers model."""

import shlex
from typing import Annotated

import typer

from molcli.cli.options import Out, Overrides, complete_recipe
from molcli.console import say
from molcli.report.bars import bar

EXAMPLE = "paper-80m-1+3of15"
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
    from molcli.config.recipe import load_model_recipe

    hint = f"molcli init {EXAMPLE} {shlex.quote(str(out))}"
    settings = load_model_recipe(recipe, overrides or (), hint)
    from molcli.files.folders import refuse_existing
    from molcli.stages.init import init as write

    refuse_existing(out)

    with bar("initialising") as progress:
        write(settings, out)
        progress(1, 1)
    say(f"Untrained model in {out}")
