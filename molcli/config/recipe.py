"""Read a recipe from YAML and `--set`, and write the resolved one."""

from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from molcli import __version__
from molcli.config import yaml_text
from molcli.config.find import find_recipe
from molcli.config.ranges import validate
from molcli.config.sections import Recipe
from molcli.config.typed import build, nearest
from molcli.errors import MolError

RECIPE_FILE = "recipe.yaml"
"""The resolved recipe's name in every folder that molcli writes."""

_SECTIONS: dict[str, Any] = get_type_hints(Recipe)


def load_recipe(source: str | Path | None, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a YAML file, with the defaults where it is silent.

    source: a path or the name of a bundled recipe; None takes the defaults. overrides: `a.b=c`
    texts, the value in YAML, entries of lists by number (`train.stages.0.tokens=1`); the last one
    wins. Raises MolError for an unknown section or key
    (naming the nearest), an ill-typed value, or one out of range.
    """
    values = _read(find_recipe(str(source))) if source is not None else {}
    for override in overrides:
        section, key, value = _parse_override(override)
        _put(values.setdefault(section, {}), section, key.split("."), value)
    recipe = Recipe(**{name: _section(name, values.get(name, {})) for name in _SECTIONS})
    validate(recipe)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes every value of the recipe; `load_recipe(path)` gives an equal one."""
    header = f"# Resolved by molcli {__version__}: every value that was in force.\n"
    path.write_text(header + yaml_text.dump(asdict(recipe)), encoding="utf-8")


def recipe_keys() -> list[str]:
    """Every `section.key` that `--set` accepts."""
    return [f"{section}.{key}" for section in _SECTIONS for key in _keys(section)]


def _keys(section: str) -> list[str]:
    return [field.name for field in fields(_SECTIONS[section])]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
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
                f"section `{section}` is {keys!r}", allowed="`key: value` lines, indented"
            )
        for key in keys or {}:
            _check_key(section, str(key))
    return {section: dict(keys or {}) for section, keys in content.items()}


def _parse_override(override: str) -> tuple[str, str, Any]:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise MolError(
            f"`--set {override}` sets nothing",
            allowed="section.key=value",
            hint="--set upcycle.d_thin=192",
        )
    _check_section(section)
    _check_key(section, key.split(".")[0])
    return section, key, yaml_text.parse(text, f"the value of `--set {name}`")


def _put(values: dict[str, Any], section: str, path: list[str], value: Any) -> None:
    """Sets the value of a key, or of a key in an entry of a list that the recipe has."""
    key, *rest = path
    if not rest:
        values[key] = value
        return
    entries, name = values.get(key), f"{section}.{key}"
    numbers = [str(i) for i in range(len(entries))] if isinstance(entries, list) else []
    number, *inner = rest
    if number not in numbers or len(inner) != 1:
        raise MolError(
            f"the recipe has no `{section}.{'.'.join(path)}`",
            allowed=f"{name}.NUMBER.KEY, NUMBER of {', '.join(numbers)}"
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
            f"there is no section `{section}`",
            allowed=", ".join(_SECTIONS),
            hint=guess,
        )


def _check_key(section: str, key: str) -> None:
    if key not in _keys(section):
        guess = nearest(key, _keys(section))
        raise MolError(
            f"`{section}` has no key `{key}`",
            allowed=", ".join(_keys(section)),
            hint=f"{section}.{guess}" if guess else "",
        )


def _section(name: str, values: dict[str, Any]) -> Any:
    return build(name, values, _SECTIONS[name])
