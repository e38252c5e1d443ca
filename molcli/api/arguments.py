"""Arguments that the functions of the Python interface share, and what they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molcli.console import note
from molcli.errors import MolError

if TYPE_CHECKING:  # these import torch or a YAML parser: `molcli --help` answers without them
    from molcli.config.recipe import Override
    from molcli.config.sections import Data, Recipe
    from molcli.families.parent import Parent

Settings = Mapping[str, Any] | Sequence[str]
"""Values that replace those of a recipe: a mapping such as {"upcycle.d_thin": 192}, or texts as
after `--set`, such as ["upcycle.d_thin=192"]."""

Text = str | Path | Sequence[str | Path] | Mapping[str, float]
"""A source of text, several in equal parts, or a mapping from sources to weights. A source is a
.txt, .jsonl or .parquet file, a folder of `molcli data tokenize`, or a data set on the Hub as
hf://org/name[:config[:split]]."""


def resolve_recipe(
    section: str,
    recipe: str | Path | Recipe | None,
    settings: Settings,
    values: Mapping[str, Any],
    *,
    checkpoint: Path | None = None,
    preset: str | None = None,
) -> Recipe:
    """Return the recipe that a call runs with.

    Args:
        section: The section that `values` belong to.
        recipe: A file, a bundled name or a recipe. None takes the recipe saved in the checkpoint,
            where there is one, else the defaults.
        settings: Replace values of the recipe and the preset.
        values: Keys of `section`; replace settings.
        checkpoint: A folder that molcli wrote.
        preset: `upcycle.preset`.

    Raises:
        MolError: As `load_recipe`.
    """
    from molcli.config.recipe import RECIPE_FILE, load_recipe

    if recipe is None and checkpoint is not None and (checkpoint / RECIPE_FILE).is_file():
        recipe = checkpoint / RECIPE_FILE
    overrides: list[Override] = [] if preset is None else [("upcycle.preset", preset)]
    overrides += settings.items() if isinstance(settings, Mapping) else settings
    overrides += [(f"{section}.{key}", value) for key, value in values.items()]
    return load_recipe(recipe, overrides)


def as_data(text: Text | None) -> Data | None:
    """Return a text as a recipe holds it.

    Raises:
        MolError: A source comes twice, or there is none.
    """
    if text is None or isinstance(text, str | Path):
        return None if text is None else str(text)
    if isinstance(text, Mapping):
        return {str(source): float(weight) for source, weight in text.items()}
    sources = [str(source) for source in text]
    if not sources or len(set(sources)) < len(sources):
        raise MolError(f"the sources are {sources}", allowed="one or more sources, each once")
    return sources[0] if len(sources) == 1 else dict.fromkeys(sources, 1.0)


def open_dense(parent: str | Path | Parent, *, show_note: bool = True) -> Parent:
    """Return the checked parent, and print a limit that the user should know of to stderr.

    Args:
        parent: A folder with safetensors, a Hub id, a .gguf file, or an opened parent.

    Raises:
        MolError: As `open_parent`.
    """
    from molcli.families.parent import Parent, open_parent

    if isinstance(parent, Parent):
        return parent
    opened = open_parent(parent)
    if opened.note and show_note:
        note(opened.note)
    return opened
