"""The header of a GGUF file, checked before the package `gguf` reads it.

That package trusts all counts and lengths: an array that claims 2^31 entries takes gigabytes. Here
every number is compared with the size of the file first.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from molcli.errors import MolError
from molcli.files.json_files import shortened

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Value types: format in `struct`.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS |= {12: "d"}
_STRING, _ARRAY = 8, 9
# Far above any model. The package takes 3 µs and 300 bytes for each entry of an array.
_MOST_KEYS, _MOST_TENSORS, _MOST_ENTRIES = 2**14, 2**17, 2**21
_LONGEST_NAME, _LONGEST_STRING = 2**16, 2**24
_MOST_DIMENSIONS = 4
_LARGEST_TENSOR = 2**40  # entries
_KEPT = 256  # characters of a string that are kept


@dataclass(frozen=True)
class GgufHeader:
    """What a file's header says.

    values: metadata, but for arrays; strings are cut. tensors: names, with shape in the file's
    order.
    """

    values: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]


def read_gguf_header(path: Path, block_sizes: dict[int, tuple[int, int]]) -> GgufHeader:
    """Read the header and check every count, length and offset in it against the file's size.

    Args:
        path: an existing file.
        block_sizes: type of tensor -> entries and bytes of a block.

    Raises:
        MolError: for a file that is damaged, not GGUF, or one part of several.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            values, tensors = _read(_Cursor(data), block_sizes)
    except (ValueError, struct.error) as error:  # ValueError also for an empty file
        raise damaged_gguf(path, error) from error
    count = values.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        number = values.get("split.no", 0)
        raise MolError(
            f"{path} is part {number + 1 if isinstance(number, int) else '?'} of {count} of a "
            "split GGUF file",
            allowed="a GGUF file that holds the whole model",
            hint="llama-gguf-split --merge FIRST_PART WHOLE.gguf",
        )
    return GgufHeader(values, tensors)


def damaged_gguf(path: Path, reason: object) -> MolError:
    """Return the error for a file that cannot be read."""
    return MolError(
        f"{path} is damaged or not a GGUF file ({shortened(' '.join(str(reason).split()), 200)})",
        allowed="a complete GGUF file",
        hint="download it again",
    )


class _Cursor:
    """A position in the file; all reads are checked against its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.size = data, 0, len(data)
        self.order = "<"

    @property
    def left(self) -> int:
        return self.size - self.at

    def number(self, kind: str) -> Any:
        layout = f"{self.order}{kind}"
        width = struct.calcsize(layout)
        self.skip(width)
        return struct.unpack_from(layout, self.data, self.at - width)[0]

    def skip(self, count: int) -> None:
        if count > self.left:
            raise ValueError(f"it ends {count - self.left} bytes too early")
        self.at += count

    def string(self, longest: int, what: str) -> bytes:
        length = self.number("Q")
        if length > longest:
            raise ValueError(f"{what} of {length} bytes")
        self.skip(length)
        return self.data[self.at - length : self.at]

    def count(self, kind: str, most: int, what: str) -> int:
        found: int = self.number(kind)
        if found > most:
            raise ValueError(f"{found} {what}")
        return found


def _read(
    cursor: _Cursor, block_sizes: dict[int, tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    if cursor.data[:4] != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    cursor.skip(4)
    version = cursor.number("I")
    if version & 0xFFFF == 0:  # the file's numbers have the other order of bytes
        cursor.order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}")
    num_tensors = cursor.count("Q", _MOST_TENSORS, "tensors")
    num_keys = cursor.count("Q", _MOST_KEYS, "keys")
    values: dict[str, Any] = {}
    entries = 0
    for _ in range(num_keys):
        key = cursor.string(_LONGEST_NAME, "a key").decode()
        if key in values:
            raise ValueError(f"the key {key} comes twice")
        kind = cursor.number("I")
        if kind == _ARRAY:
            values[key] = None
            entries += _skip_array(cursor, key, _MOST_ENTRIES - entries)
        else:
            values[key] = _value(cursor, kind, key)
    return values, _tensors(cursor, num_tensors, values, block_sizes)


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.string(_LONGEST_STRING, f"the value of {key}")[:_KEPT].decode(
            errors="replace"
        )
    if kind not in _SCALARS:
        raise ValueError(f"{key} has a value of type {kind}")
    return cursor.number(_SCALARS[kind])


def _skip_array(cursor: _Cursor, key: str, most: int) -> int:
    """Move past an array; returns its number of entries."""
    kind, count = cursor.number("I"), cursor.number("Q")
    if count > most:
        raise ValueError(f"{key} has {count} entries")
    if kind == _STRING:
        for _ in range(count):
            cursor.string(_LONGEST_STRING, f"an entry of {key}")
    elif kind in _SCALARS:
        cursor.skip(count * struct.calcsize(f"<{_SCALARS[kind]}"))
    else:
        raise ValueError(f"{key} is an array of type {kind}")
    return int(count)


def _tensors(
    cursor: _Cursor,
    count: int,
    values: dict[str, Any],
    block_sizes: dict[int, tuple[int, int]],
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    ends = []
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & alignment - 1:
        raise ValueError(f"general.alignment is {alignment}")
    for _ in range(count):
        name = cursor.string(_LONGEST_NAME, "a tensor's name").decode()
        if name in shapes:
            raise ValueError(f"the tensor {name} comes twice")
        dimensions = cursor.count("I", _MOST_DIMENSIONS, f"dimensions of {name}")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))
        kind, offset = cursor.number("I"), cursor.number("Q")
        if kind not in block_sizes:
            raise ValueError(f"{name} has the type {kind}")
        block, width = block_sizes[kind]
        if not shape or 0 in shape or prod(shape) > _LARGEST_TENSOR or shape[0] % block:
            raise ValueError(f"{name} has shape {shape}")
        if offset % alignment:
            raise ValueError(f"{name} begins at {offset}")
        shapes[name] = shape
        ends.append((name, offset + prod(shape) // block * width))
    start = -(-cursor.at // alignment) * alignment
    for name, end in ends:
        if start + end > cursor.size:
            raise ValueError(f"{name} ends {start + end - cursor.size} bytes after the file")
    return shapes
