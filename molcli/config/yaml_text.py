"""Read and write YAML 1.1, with the floats of YAML 1.2 and without repeated keys."""

import re
from typing import Any

import yaml

from molcli.errors import MolError

# PyYAML follows YAML 1.1, where a float needs a dot and a signed exponent: `1e-4` is text there.
_FLOAT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+")


def parse(text: str, origin: str) -> Any:
    """Read a YAML document as plain Python values.

    Args:
        text: The document.
        origin: Where the text came from, for error messages.

    Raises:
        MolError: The text is not YAML, or a mapping has a key twice.
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
    """Write plain values as YAML text that `parse` reads back as equal values.

    The text is ASCII: PyYAML writes some of Unicode's line breaks so that they read back as spaces.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False)


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
    """Quotes text that the loader would read as a number."""


# YAML has no tuples.
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)

for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
