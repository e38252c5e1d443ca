"""Find a recipe, read it from YAML and `--set`, and write the resolved one."""

import re
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from molcli import __version__
from molcli.config import recipe as yaml_text
from molcli.config.ranges import validate
from molcli.config.sections import Recipe
from molcli.config.typed import build, nearest
from molcli.errors import MolError

# PyYAML follows YAML 1.1, where a float needs a dot and a signed exponent: `1e-4` is text there.
_FLOAT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise MolError(
                    f"a key is not a word (line {key.start_mark.line + 1})",
                    allowed="`key: value` lines",
                )
            if key.value in seen:
                raise MolError(
                    f"key `{key.value}` comes twice (line {key.start_mark.line + 1})",
                    allowed="each key once",
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would read as a number."""


# YAML has no tuples.
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)

for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse(text: str, origin: str) -> Any:
    """The YAML document as plain Python values.

    origin: where the text came from, for the error. Raises MolError if it is not YAML.
    """
    try:
        # A subclass of SafeLoader: it builds plain values only.
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place is not None else ""
        raise MolError(
            f"{origin} is not YAML{line}: {getattr(error, 'problem', None) or error}",
            allowed="`key: value` lines under the names of sections",
        ) from error


def dump(value: Any) -> str:
    """YAML text that `parse` reads back as the same value.

    In ASCII: PyYAML writes some of Unicode's line breaks so that they read back as spaces.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False)


# Built wheels carry the recipes inside the package; in a source checkout they lie beside it.
_FOLDERS = (
    Path(__file__).parent.parent / "recipes",
    Path(__file__).parent.parent.parent / "recipes",
)


def bundled_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that ships with the package, sorted by name."""
    for folder in _FOLDERS:
        if files := sorted(folder.glob("*.yaml"), key=lambda file: file.stem):
            return {file.stem: file for file in files}
    return {}


def find_recipe(name: str) -> Path:
    """The file that `--recipe` means: a path, or a bundled name with or without .yaml.

    Raises MolError, naming the nearest bundled recipe and all of them.
    """
    path = Path(name)
    if path.is_file():
        return path
    bundled = bundled_recipes()
    stem = path.name.removesuffix(".yaml")
    # `recipes/demo.yaml` works away from the source tree, too: it is how the README writes it.
    if path.parent in (Path(), Path("recipes")) and stem in bundled:
        return bundled[stem]
    guess = nearest(stem, list(bundled))
    found = f"recipe `{name}` is a folder" if path.is_dir() else f"there is no recipe `{name}`"
    raise MolError(
        found,
        allowed=f"a .yaml file, or one of: {', '.join(bundled)}",
        hint=f"--recipe {guess}" if guess else "",
    )


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
