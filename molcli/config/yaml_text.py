"""Read and write YAML: plain values only, within bounds, and without repeated keys.

Numbers are those of YAML 1.2. YAML 1.1, which PyYAML follows, reads `010` as 8, `1:30` as 90,
`1e-4` as text and `2024-01-01` as a date. Here `1e-4` is a number, the others are text.
"""

import re
from typing import Any

import yaml

from molcli.config.shown import cut
from molcli.errors import MolError

MAX_CHARACTERS = 256 * 2**10
MAX_NODES = 10_000  # values and keys, those of an alias counted wherever it stands
MAX_DEPTH = 20
MAX_DIGITS = 30  # of an integer; longer ones are text, which no number is read from

_INT = re.compile(
    rf"[-+]?(?:0|[1-9][0-9_]{{0,{MAX_DIGITS}}}|0x[0-9a-fA-F_]{{1,{MAX_DIGITS}}}"
    rf"|0b[01_]{{1,{MAX_DIGITS}}})"
)
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
_PREFIX = "tag:yaml.org,2002:"
_REPLACED = {f"{_PREFIX}{name}" for name in ("int", "float", "timestamp", "value")}


def parse(text: str, origin: str) -> Any:
    """Read a YAML document as plain Python values.

    Args:
        text: The document.
        origin: Where the text came from, for error messages.

    Raises:
        MolError: The text is not YAML, is too large or too deep for a recipe, has a tag other than
            `!!str`, or a mapping has a key twice.
    """
    if len(text) > MAX_CHARACTERS:
        raise MolError(
            f"{origin} has more than {MAX_CHARACTERS:,} characters",
            allowed="a recipe that is written by hand, or by molcli",
        )
    try:
        _check_size(text, origin)
        # A subclass of SafeLoader: it builds plain values only.
        loader = _Loader(text)
        loader.name = origin
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError) as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place is not None else ""
        raise MolError(
            f"{origin} is not YAML{line}: {cut(getattr(error, 'problem', None) or str(error))}",
            allowed="`key: value` lines under the names of sections",
        ) from error


def dump(value: Any) -> str:
    """Write plain values as YAML text that `parse` reads back as equal values.

    The text is ASCII: PyYAML writes some of Unicode's line breaks so that they read back as spaces.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False)


def _check_size(text: str, origin: str) -> None:
    """Count the values that the text stands for, before any of them is built.

    Raises:
        MolError: They are too many or too deep, one contains itself, or one has a tag.
    """
    sizes: dict[str | None, int] = {}  # of what an anchor stands for
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and the count before it
    count = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = "" if event.start_mark is None else f", line {event.start_mark.line + 1},"
        place = f"{origin}{line}"
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in open_nodes):
                raise MolError(f"{place} has a value that contains itself", allowed="plain values")
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            if event.tag not in (None, "!", f"{_PREFIX}str"):
                tag = event.tag.replace(_PREFIX, "!!")
                raise MolError(
                    f"{place} is not YAML of a recipe: it has the tag {cut(tag)}",
                    allowed="values without a tag",
                )
            count += 1
            if isinstance(event, yaml.ScalarEvent):
                sizes[event.anchor] = 1
            else:
                open_nodes.append((event.anchor, count - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes[anchor] = count - before
        if count > MAX_NODES:
            raise MolError(f"{place} has too many values", allowed=f"at most {MAX_NODES:,}")
        if len(open_nodes) > MAX_DEPTH:
            raise MolError(f"{place} is nested too deeply", allowed=f"at most {MAX_DEPTH} levels")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            place = f"in {self.name}, line {key.start_mark.line + 1},"
            if not isinstance(key, yaml.ScalarNode):
                raise MolError(f"{place} a key is not a word", allowed="`key: value` lines")
            if key.value in seen:
                raise MolError(
                    f"{place} the key `{cut(key.value)}` comes twice", allowed="each key once"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would read as a number."""


# YAML has no tuples.
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)

for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _name, _pattern in (("int", _INT), ("float", _FLOAT)):
        _whole = re.compile(f"(?:{_pattern.pattern})$")
        _class.add_implicit_resolver(f"{_PREFIX}{_name}", _whole, list("-+0123456789."))
