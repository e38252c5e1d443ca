"""Find a recipe, read it from YAML and overrides, and write the resolved one."""

import stat
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from molcli import __version__
from molcli.config import yaml_text
from molcli.config.ranges import validate
from molcli.config.sections import Recipe
from molcli.config.shown import cut, shown
from molcli.config.typed import build, nearest
from molcli.errors import MolError

RECIPE_FILE = "recipe.yaml"
"""Name of the resolved recipe in every folder that molcli writes."""

RENAMED_KEYS = {
    "convert.budget": "convert.gated_deltanet_budget",
    "evaluate.prompts": "evaluate.num_prompts",
    "model.layer_kind": "model.layer_mixer",
}
"""Old -> new name. Recipes with an old name are refused with the new one; those that molcli saved
beside a checkpoint are read with the new one."""
_RENAMED_VALUES = {("model.layer_mixer", "softmax"): "attention"}
_SAVED = "# Resolved by molcli "  # how a saved recipe begins

Override = str | tuple[str, Any]
"""Text such as "upcycle.d_thin=192", whose value is YAML, or a key and a Python value."""

_SECTIONS: dict[str, Any] = get_type_hints(Recipe)
# Built wheels carry the recipes inside the package; in a source checkout they lie beside it.
_FOLDERS = (
    Path(__file__).parent.parent / "recipes",
    Path(__file__).parent.parent.parent / "recipes",
)


def load_recipe(source: str | Path | Recipe | None, overrides: Iterable[Override] = ()) -> Recipe:
    """Read a recipe, with defaults for the keys that it leaves out.

    Args:
        source: A YAML file, the name of a bundled recipe, or a recipe to change; None takes the
            defaults.
        overrides: Values that replace those of the recipe; of two for one key, the last one counts.
            An entry of a list is addressed by its number, as in `train.stages.0.tokens=1`.

    Raises:
        MolError: An unknown section or key (the message names the nearest), a renamed key, a value
            of another type, or one out of range.
    """
    overrides, values = list(overrides), dict[str, Any]()
    if isinstance(source, Recipe):
        if not overrides:
            return source
        values = asdict(source)
    elif source is not None:
        values = _read(find_recipe(str(source)))
    for override in overrides:
        section, key, value = _parse_override(override)
        _put(values.setdefault(section, {}), section, key.split("."), value)
    recipe = Recipe(
        **{name: build(name, values.get(name, {}), kind) for name, kind in _SECTIONS.items()}
    )
    validate(recipe)
    return recipe


def load_model_recipe(source: str, overrides: Iterable[Override], hint: str) -> Recipe:
    """Read a recipe that describes an untrained model, in a section `model` of its own.

    Args:
        source: A YAML file, or the name of a bundled recipe.
        overrides: As for `load_recipe`.
        hint: For the message: a command with a recipe that has the section.

    Raises:
        MolError: As `load_recipe`; or the recipe has no section `model`, whose defaults would be a
            model that nobody asked for.
    """
    recipe = load_recipe(source, overrides)
    if "model" not in _read(find_recipe(source)):
        names = [name for name, path in bundled_recipes().items() if "model" in _read(path)]
        raise MolError(
            f"recipe {source} has no section `model`, hence describes no untrained model",
            allowed=f"a recipe that has one, such as {', '.join(names)}",
            hint=hint,
        )
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write every value of the recipe; `load_recipe(path)` returns an equal one."""
    header = f"{_SAVED}{__version__}: every value that was in force.\n"
    path.write_text(header + yaml_text.dump(asdict(recipe)), encoding="utf-8")


def bundled_recipes() -> dict[str, Path]:
    """Return name -> file of every recipe that ships with the package, sorted by name."""
    for folder in _FOLDERS:
        if files := sorted(folder.glob("*.yaml"), key=lambda file: file.stem):
            return {file.stem: file for file in files}
    return {}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: A path, or the name of a bundled recipe with or without .yaml.

    Raises:
        MolError: There is no such recipe; the message names the nearest bundled one and all others.
    """
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # also of a name that no file can have
        mode = 0
    if stat.S_ISREG(mode):
        return path
    bundled = bundled_recipes()
    stem = path.name.removesuffix(".yaml")
    # `recipes/demo.yaml` works away from the source tree, too: it is how the README writes it.
    if path.parent in (Path(), Path("recipes")) and stem in bundled:
        return bundled[stem]
    guess = nearest(stem, list(bundled))
    word = f"recipe `{cut(name, 200)}`"
    if stat.S_ISDIR(mode):
        found = f"{word} is a folder"
    else:
        found = f"{word} is a device or a pipe, and is not read" if mode else f"there is no {word}"
    raise MolError(
        found,
        allowed=f"a .yaml file, or one of: {', '.join(bundled)}",
        hint=f"--recipe {guess}" if guess else "",
    )


def recipe_keys() -> list[str]:
    """Return every `section.key` that an override accepts."""
    return [f"{section}.{key}" for section in _SECTIONS for key in _keys(section)]


def _keys(section: str) -> list[str]:
    return [field.name for field in fields(_SECTIONS[section])]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(yaml_text.MAX_CHARACTERS + 1)  # `parse` refuses a longer one
    except UnicodeDecodeError as error:
        raise MolError(f"recipe {path} is not text", allowed="a YAML file in UTF-8") from error
    content = yaml_text.parse(text, f"recipe {path}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise MolError(f"recipe {path} holds no sections", allowed=", ".join(_SECTIONS))
    for section, keys in content.items():
        _check_section(str(section))
        if keys is not None and not isinstance(keys, dict):
            raise MolError(
                f"section `{section}` is {shown(keys)}", allowed="`key: value` lines, indented"
            )
        if keys and text.startswith(_SAVED):
            content[section] = keys = _with_new_names(section, keys)
        for key in keys or {}:
            _check_key(section, str(key), f"rename the key in {path}")
    return {section: dict(keys or {}) for section, keys in content.items()}


def _with_new_names(section: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Rename keys and values of a recipe that an earlier molcli saved."""
    found = {}
    for key, value in keys.items():
        name = RENAMED_KEYS.get(f"{section}.{key}", f"{section}.{key}")
        known = isinstance(value, str)
        found[name.partition(".")[2]] = (
            _RENAMED_VALUES.get((name, value), value) if known else value
        )
    return found


def _parse_override(override: Override) -> tuple[str, str, Any]:
    """Return section, key and value."""
    if isinstance(override, str):
        name, equals, text = override.partition("=")
        found = f"`--set {cut(override)}` sets nothing"
    else:
        name, equals, text = override[0], "=", ""
        found = f"setting `{cut(name)}` names no section"
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise MolError(found, allowed="section.key=value", hint="--set upcycle.d_thin=192")
    _check_section(section)
    _check_key(section, key.split(".")[0])
    if isinstance(override, str):
        return section, key, yaml_text.parse(text, f"the value of `--set {cut(name)}`")
    return section, key, deepcopy(override[1])  # `_put` may change it


def _put(values: dict[str, Any], section: str, path: list[str], value: Any) -> None:
    """Set the value of a key, or of a key in an entry of a list that the recipe has."""
    key, *rest = path
    if not rest:
        values[key] = value
        return
    entries, name = values.get(key), f"{section}.{key}"
    numbers = [str(i) for i in range(len(entries))] if isinstance(entries, list) else []
    number, *inner = rest
    if number not in numbers or len(inner) != 1:
        raise MolError(
            f"the recipe has no `{section}.{cut('.'.join(path))}`",
            allowed=f"{name}.NUMBER.KEY, NUMBER of {cut(', '.join(numbers))}"
            if numbers
            else f"a recipe with a list of {name}",
        )
    entry = values[key][int(number)]
    if isinstance(entry, dict):  # anything else is refused when it is read
        entry[inner[0]] = value


def _check_section(section: str) -> None:
    if section not in _SECTIONS:
        guess = nearest(section, list(_SECTIONS))
        raise MolError(
            f"there is no section `{cut(section)}`",
            allowed=", ".join(_SECTIONS),
            hint=guess,
        )


def _check_key(section: str, key: str, how: str = "") -> None:
    """Raise MolError for an unknown or renamed key. how: what to do about a renamed one."""
    if new := RENAMED_KEYS.get(f"{section}.{key}"):
        raise MolError(f"`{section}.{key}` is now `{new}`", allowed=f"`{new}`", hint=how or new)
    if key not in _keys(section):
        guess = nearest(key, _keys(section))
        raise MolError(
            f"`{section}` has no key `{cut(key)}`",
            allowed=", ".join(_keys(section)),
            hint=f"{section}.{guess}" if guess else "",
        )
