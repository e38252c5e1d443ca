"""The header of a safetensors file: read within bounds, and checked against the file's size."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from molcli.errors import MolError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_MAX_SIZE = 2**63  # of a dimension; torch holds no larger one


@dataclass(frozen=True)
class TensorInfo:
    """Header of a tensor in a shard.

    dtype: Name in safetensors, such as "BF16".
    start: Position of the data in the shard, in bytes.
    """

    shard: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    num_bytes: int


def read_header(shard: Path) -> dict[str, TensorInfo]:
    """Read the header of a file that exists.

    The checks are at least those of the safetensors library, which does not name the tensor.

    Returns:
        Name -> header of each tensor.

    Raises:
        MolError: If the header is larger than the file or `MAX_HEADER_BYTES`, is no header, or
            describes other data than the file has.
    """
    size = shard.stat().st_size
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise damaged_file(shard, f"is not a whole safetensors file ({size} bytes)")
        if length > MAX_HEADER_BYTES:
            raise damaged_file(shard, f"has a header of {length} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        problem = f"is not a whole safetensors file ({size} bytes; its header: {error})"
        raise damaged_file(shard, problem) from error
    if not isinstance(header, dict):
        raise damaged_file(shard, "has a header that is no JSON object")
    if not _is_metadata(header.pop("__metadata__", None)):
        raise damaged_file(shard, "has __metadata__ that is not text")
    infos = {}
    for name, entry in header.items():
        problem = _problem(name, entry)
        if problem:
            raise damaged_file(shard, f"has a tensor {name[:100]!r} {problem}")
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        infos[name] = TensorInfo(shard, shape, entry["dtype"], 8 + length + begin, end - begin)
    expected = _end(infos.values(), 8 + length, shard)
    if size != expected:
        raise damaged_file(shard, f"has {size} bytes, but its header describes {expected}")
    return infos


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _is_metadata(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _problem(name: str, entry: Any) -> str:
    """Say what is wrong with the entry of a tensor, or return ""."""
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            return "whose name is not UTF-8"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "without the fields dtype, shape and data_offsets alone"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        return f"of dtype {str(dtype)[:20]}, which this version does not know"
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        return "with a shape or data_offsets that are no sizes"
    if 8 * (offsets[1] - offsets[0]) != prod(shape) * _BITS[dtype]:
        return f"of shape {str(shape)[:60]} and {dtype} in {offsets[1] - offsets[0]} bytes"
    return ""


def _are_sizes(values: Any) -> bool:
    if not isinstance(values, list):
        return False
    return all(type(value) is int and 0 <= value < _MAX_SIZE for value in values)


def _end(infos: Iterable[TensorInfo], start: int, shard: Path) -> int:
    """Return where the last tensor ends; they must lie end to end."""
    for info in sorted(infos, key=lambda info: (info.start, info.num_bytes)):
        if info.start != start:
            raise damaged_file(shard, "has tensors that overlap, or bytes that belong to none")
        start += info.num_bytes
    return start


def damaged_file(shard: Path, problem: str) -> MolError:
    """Return the error for a safetensors file that cannot be read."""
    return MolError(
        f"{shard} {problem}",
        allowed="a complete safetensors file",
        hint=f"download {shard.name} again (with git: git lfs pull)",
    )
