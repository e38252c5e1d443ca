"""The options that several commands share, and their shell completion."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molcli.errors import MolError

if TYPE_CHECKING:  # imported when needed: help answers without a YAML parser
    from molcli.config.sections import Data as DataSpec
    from molcli.config.sections import Recipe


def complete_recipe(incomplete: str) -> list[str]:
    """Names of bundled recipes, for the shell."""
    from molcli.config.recipe import bundled_recipes

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
_SOURCE = "A .txt, .jsonl or .parquet file, a folder of `molcli data tokenize`, or hf://org/name."
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
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        metavar="SOURCE[=WEIGHT]",
        help=f"{_SOURCE} Repeatable; WEIGHT is a source's share of the tokens.",
    ),
]
OneSource = Annotated[str | None, typer.Option("--data", "-d", metavar="SOURCE", help=_SOURCE)]
RequiredData = Annotated[str, typer.Option("--data", "-d", metavar="SOURCE", help=_SOURCE)]
ParentOption = Annotated[
    str | None,
    typer.Option("--parent", "-p", metavar="PARENT", help="The dense model it came from."),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here, too.")
]


def data_for(sources: list[str] | None) -> "DataSpec | None":
    """What a repeated `--data` means: nothing, one source, or sources and their weights.

    Raises MolError if a source comes twice, or some of several have a weight and others do not.
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
            allowed="a weight for each source, or for none (equal shares)",
            hint=f"--data {bare[0]}=0.5",
        )
    return {source: 1.0 if weight is None else weight for source, weight in weights.items()}


def _weighted(source: str) -> tuple[str, float | None]:
    """What follows the last `=` is a weight if it is a number and no file has the whole name."""
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
