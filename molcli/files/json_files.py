"""JSON files: read within bounds, checked for the fields that are needed; written without NaN."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molcli.errors import MolError
from molcli.files.atomic import write_atomically

MAX_BYTES = 64 * 2**20  # far above any configuration, index or receipt; a larger file is not one


def read_object(
    path: Path,
    fields: Mapping[str, type | tuple[type, ...]] | None = None,
    *,
    allowed: str,
    hint: str,
) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: An existing file.
        fields: Required keys, and the types that their values may have. An int is accepted where a
            float is required; a bool only where bool is named.
        allowed: For the message: what the file should be.
        hint: For the message: the command that writes or fetches the file.

    Raises:
        MolError: If the file is missing, no regular file, larger than `MAX_BYTES`, not a JSON
            object in UTF-8, nested too deeply, has a number that is not finite, or lacks a field.
    """

    def refuse(problem: str) -> MolError:
        return MolError(f"{path} {problem}", allowed=allowed, hint=hint)

    try:
        size = path.stat().st_size
        if not path.is_file():  # a device may have no end
            raise refuse("is not a regular file")
        if size > MAX_BYTES:
            raise refuse(f"has {size} bytes, which is too large for such a file")
        content = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, parse_float=_finite
        )
    except FileNotFoundError as error:
        raise refuse("is missing") from error
    except (ValueError, RecursionError) as error:
        raise refuse(f"cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise refuse("is not a JSON object")
    for name, types in (fields or {}).items():
        if name not in content:
            raise refuse(f"has no {name}")
        if not _has_type(content[name], types if isinstance(types, tuple) else (types,)):
            raise refuse(f"has {name}: {shortened(content[name])}")
    return content


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, two spaces a level, in UTF-8; complete, or the file is as before.

    Raises:
        MolError: If a number is not finite; nothing is written.
    """
    place = _non_finite(content)
    if place is not None:
        raise MolError(
            f"{place} in {path.name} would be NaN or infinite",
            allowed="finite figures",
            hint="report this, with the command: figures that are undefined should be left out",
        )
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def shortened(value: Any, length: int = 60) -> str:
    """Return the start of a value's text, for a message."""
    text = str(value)
    return text if len(text) <= length else f"{text[:length]}…"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    """Read a number; Python takes 1e400 for infinity."""
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(shortened(text))


def _has_type(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, types) or (float in types and isinstance(value, int))


def _non_finite(value: Any, place: str = "") -> str | None:
    """Return where the first number that is not finite lies, such as "layers.0.kl"."""
    if isinstance(value, float) and not math.isfinite(value):
        return place
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        found = _non_finite(item, f"{place}.{key}" if place else str(key))
        if found is not None:
            return found
    return None
