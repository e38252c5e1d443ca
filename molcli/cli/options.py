"""The options that several commands share, and their shell completion."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # imported when needed: help answers without a YAML parser
    from molcli.config.sections import Recipe


def complete_recipe(incomplete: str) -> list[str]:
    """Names of bundled recipes, for the shell."""
    from molcli.config.find import bundled_recipes

    return [name for name in bundled_recipes() if name.startswith(incomplete)]


def _complete_key(incomplete: str) -> list[str]:
    from molcli.config.recipe import recipe_keys

    return [f"{key}=" for key in recipe_keys() if key.startswith(incomplete)]


def _complete_preset(incomplete: str) -> list[str]:
    return [name for name in ("quality", "balanced", "fast") if name.startswith(incomplete)]


Parent = Annotated[
    str,
    typer.Argument(
        metavar="PARENT",
        help="The dense model: a folder with safetensors, a Hub id, or a .gguf file.",
    ),
]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="The folder of a Mixture of Layers model.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist.")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="RECIPE",
        help="A .yaml file, or the name of a bundled recipe.",
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="SECTION.KEY=VALUE",
        help="Change one value of the recipe, such as upcycle.d_thin=192. Repeatable.",
        autocompletion=_complete_key,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="quality|balanced|fast",
        help="Short for --set upcycle.preset=...; other values that are set win over it.",
        autocompletion=_complete_preset,
    ),
]
Data = Annotated[
    str | None,
    typer.Option("--data", "-d", metavar="FILE", help="A .txt, .jsonl or .parquet file."),
]
RequiredData = Annotated[
    str, typer.Option("--data", "-d", metavar="FILE", help="A .txt, .jsonl or .parquet file.")
]
ParentOption = Annotated[
    str | None,
    typer.Option("--parent", "-p", metavar="PARENT", help="The dense model it came from."),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here, too.")
]


def recipe_for(
    name: str | None,
    overrides: list[str] | None,
    checkpoint: Path | None = None,
    preset: str | None = None,
) -> "Recipe":
    """The recipe that a command runs with.

    Without --recipe, the one saved in the checkpoint at hand, else the defaults. preset: of
    --preset, in place of the recipe's.
    """
    from molcli.config.recipe import RECIPE_FILE, load_recipe

    saved = None if checkpoint is None else checkpoint / RECIPE_FILE
    source = name if name is not None or saved is None or not saved.is_file() else saved
    chosen = [] if preset is None else [f"upcycle.preset={preset}"]
    return load_recipe(source, [*chosen, *(overrides or ())])
