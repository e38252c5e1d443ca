"""What both forms on disk share: an index with a sum of itself, and shards checked once.

The sum shows a bit that flipped in the index, and the index, or what it vouches for, shows one in a
shard. A shard is checked when its first row is read, not when a folder is opened.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from molcli.files.json_files import read_object, write_object

SUM = "sha256"
_checked: set[tuple[object, ...]] = set()


def write_index(path: Path, content: Mapping[str, Any]) -> None:
    """Write an index, with its sum."""
    write_object(path, {**content, SUM: sum_of(content)})


def read_index(
    path: Path, fields: Mapping[str, type | tuple[type, ...]]
) -> tuple[dict[str, Any], bool]:
    """Read an index.

    Args:
        path: Written by `write_index`, or by an earlier molcli, without a sum.
        fields: Every field and the types that it may have.

    Returns:
        The index without its sum, and whether it had one.

    Raises:
        MolError: If the file cannot be read, or lacks a field.
        ValueError: If it has other fields, or another sum than it says.
    """
    content = read_object(path, fields, allowed="", hint="")
    own = content.pop(SUM, None)
    if unknown := content.keys() - fields.keys():
        raise ValueError(f"{path.name} has a field {min(unknown)!r}")
    if own is not None and own != sum_of(content):
        raise ValueError(f"the content of {path.name} does not have its sha256: it was changed")
    return content, own is not None


def sum_of(content: Mapping[str, Any]) -> str:
    """Return the sha256 of a JSON object, in whatever layout a file has it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_once(files: list[Path], expected: str, check: Callable[[], None]) -> None:
    """Call `check`, unless this process did for the same files, unchanged since.

    Args:
        files: What is checked.
        expected: What it is checked against.
        check: Raises if the check fails.
    """
    stats = [(path.resolve(), path.stat()) for path in files]
    key = (expected, *((p, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in stats))
    if key not in _checked:
        check()
        _checked.add(key)
