"""Options that several commands share, and their shell completion."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molcli.errors import MolError

if TYPE_CHECKING:  # imported when needed: help answers without a YAML parser
    from molcli.config.sections import Recipe


def complete_recipe(incomplete: str) -> list[str]:
    """Return the names of bundled recipes that the shell may complete to."""
    from molcli.config.recipe import bundled_recipes

    return [name for name in bundled_recipes() if name.startswith(incomplete)]


def _complete_key(incomplete: str) -> list[str]:
    from molcli.config.recipe import recipe_keys

    return [f"{key}=" for key in recipe_keys() if key.startswith(incomplete)]


def _complete_preset(incomplete: str) -> list[str]:
    from molcli.config.sections import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


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
_OUT = "The folder to write; must not exist, or be empty"
Out = Annotated[Path, typer.Argument(metavar="OUT", help=f"{_OUT}.")]
ResumableOut = Annotated[
    Path, typer.Argument(metavar="OUT", help=f"{_OUT}, or hold the run that --resume continues.")
]
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
        metavar="quality|balanced|fast|paper",
        help="The same as --set upcycle.preset=...; values of --set replace the preset's.",
        autocompletion=_complete_preset,
    ),
]
_SOURCE = "A .txt, .jsonl or .parquet file, a folder of `molcli data tokenize`, or hf://org/name."
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        metavar="SOURCE[=WEIGHT]",
        help=f"{_SOURCE} Repeatable; WEIGHT is relative to the other sources', in tokens.",
    ),
]
OneSource = Annotated[str | None, typer.Option("--data", "-d", metavar="SOURCE", help=_SOURCE)]
RequiredData = Annotated[str, typer.Option("--data", "-d", metavar="SOURCE", help=_SOURCE)]
ParentOption = Annotated[
    str | None,
    typer.Option("--parent", "-p", metavar="PARENT", help="The dense model it was made from."),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="DIR",
        help="A folder that `molcli calibrate` wrote for the parent.",
    ),
]


def data_for(sources: list[str] | None) -> str | dict[str, float] | None:
    """Return one source, or sources and their weights, from the values of a repeated `--data`.

    Raises:
        MolError: A source comes twice, or only some of several have a weight.
    """
    if not sources:
        return None
    weights = dict(map(_weighted, sources))
    if len(weights) < len(sources):
        raise MolError("`--data` names a source twice", allowed="each source once")
    if len(weights) == 1:
        return next(iter(weights))
    bare = [source for source, weight in weights.items() if weight is None]
    if bare and len(bare) < len(weights):
        raise MolError(
            f"`--data {bare[0]}` has no weight, though others have",
            allowed="a weight for each source, or for none (equal weights)",
            hint=f"--data {bare[0]}=0.5",
        )
    return {source: 1.0 if weight is None else weight for source, weight in weights.items()}


def _weighted(source: str) -> tuple[str, float | None]:
    """Split at the last `=` if a number follows it and no file has the whole name."""
    name, _, text = source.rpartition("=")
    if not name or Path(source).exists():
        return source, None
    try:
        weight = float(text)
    except ValueError:
        return source, None
    if not 0 < weight < float("inf"):
        raise MolError(f"`--data {source}` has weight {text}", allowed="a number above 0")
    return name, weight


def recipe_for(name: str | None, overrides: list[str] | None) -> "Recipe":
    """Return the recipe of a command that takes no checkpoint."""
    from molcli.config.recipe import load_recipe

    return load_recipe(name, overrides or ())
