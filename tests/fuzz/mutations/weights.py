"""Safetensors files and their index: headers that lie, values that are no numbers, other shards."""

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.mutations.json_values import change_json
from tests.fuzz.mutations.mutation import (
    Effect,
    Mutation,
    NotApplicable,
    pick_file,
    shown,
    some_number,
)

INDEX = "model.safetensors.index.json"
_DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I32", "U8", "BOOL", "F4", "", "f32"]
_BAD_NUMBERS = {
    "F32": [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f"],
    "BF16": [b"\xc0\x7f", b"\x80\x7f", b"\x80\xff", b"\x7f\x7f"],
    "F16": [b"\0\x7e", b"\0\x7c", b"\0\xfc", b"\xff\x7b"],
}


class File:
    """A safetensors file: its header as an object, and its data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        self.header: dict[str, Any] = json.loads(content[8 : 8 + size])
        self.data = bytearray(content[8 + size :])

    def names(self, draw: Random) -> list[str]:
        """Tensors in a random order."""
        names = sorted(name for name in self.header if name != "__metadata__")
        draw.shuffle(names)
        if not names:
            raise NotApplicable
        return names

    def write(self, header: bytes | None = None, length: int | None = None) -> None:
        """Write it back, with a valid length of the header, or as asked."""
        header = json.dumps(self.header).encode() if header is None else header
        header += b" " * (-len(header) % 8)
        size = len(header) if length is None else length % 2**64
        self.path.write_bytes(struct.pack("<Q", size) + header + self.data)


def _open(path: Path, draw: Random) -> File:
    return File(pick_file(path, draw, "*.safetensors"))


def _header_value(path: Path, draw: Random) -> str:
    file = _open(path, draw)
    text, done = change_json(file.header, draw)
    file.write(text.encode(errors="surrogatepass"))
    return f"{shown(file.path, path)}: header: {done}"


def _header_field(path: Path, draw: Random) -> str:
    """A dtype, a shape or offsets that do not fit the rest."""
    file = _open(path, draw)
    name = file.names(draw)[0]
    entry = file.header[name]
    field = draw.choice(["dtype", "shape", "data_offsets"])
    if field == "dtype":
        entry[field] = draw.choice(_DTYPES)
    elif field == "shape":
        shape = entry[field]
        changed = [*shape]
        if changed:
            changed[draw.randrange(len(changed))] = some_number(draw)
        entry[field] = draw.choice(
            [changed, shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [], [2**32, 2**32, *shape]]
        )
    else:
        start, end = entry[field]
        entry[field] = draw.choice(
            [[end, start], [start, end + 4], [start + 4, end], [0, end - start], [-1, end],
             [start, some_number(draw)], [some_number(draw), some_number(draw)], [start]]
        )  # fmt: skip
    file.write()
    return f"{shown(file.path, path)}: {name}: {field} := {entry[field]!r:.60}"


def _header_length(path: Path, draw: Random) -> str:
    file = _open(path, draw)
    size = draw.choice([some_number(draw), 100_000_000, 100_000_001, len(file.data)])
    file.write(length=size)
    return f"{shown(file.path, path)}: header of {size} bytes"


def _not_finite(path: Path, draw: Random) -> str:
    file = _open(path, draw)
    for name in file.names(draw):
        entry = file.header[name]
        if entry["dtype"] in _BAD_NUMBERS and entry["data_offsets"][1] > entry["data_offsets"][0]:
            value = draw.choice(_BAD_NUMBERS[entry["dtype"]])
            start, end = entry["data_offsets"]
            at = draw.randrange(start, end, len(value))
            everywhere = draw.random() < 0.2
            if everywhere:
                file.data[start:end] = value * ((end - start) // len(value))
            else:
                file.data[at : at + len(value)] = value
            file.write()
            where = "everywhere" if everywhere else f"at {at}"
            return f"{shown(file.path, path)}: {name}: {value.hex()} {where}"
    raise NotApplicable


def _zero_tensor(path: Path, draw: Random) -> str:
    file = _open(path, draw)
    name = file.names(draw)[0]
    start, end = file.header[name]["data_offsets"]
    file.data[start:end] = bytes(end - start)
    file.write()
    return f"{shown(file.path, path)}: {name}: zeros"


def _rename_tensor(path: Path, draw: Random) -> str:
    file = _open(path, draw)
    name = file.names(draw)[0]
    new = draw.choice(
        [f"{name}_", "", "__metadata__", "../x", "\x1b[2J", "[red]x", "é" * 200, name.upper(),
         name.replace(".0.", ".1."), name.replace(".1.", ".2."), name.replace("0", "-1")]
    )  # fmt: skip
    file.header[new] = file.header.pop(name)
    file.write()
    return f"{shown(file.path, path)}: {name} is called {new!r:.60}"


def _drop_tensor(path: Path, draw: Random) -> str:
    file = _open(path, draw)
    name = file.names(draw)[0]
    start, end = file.header.pop(name)["data_offsets"]
    del file.data[start:end]
    for other in file.names(draw) if len(file.header) > ("__metadata__" in file.header) else ():
        offsets = file.header[other]["data_offsets"]
        if offsets[0] >= end:
            file.header[other]["data_offsets"] = [value - (end - start) for value in offsets]
    file.write()
    return f"{shown(file.path, path)}: {name} left out"


def _index_entry(path: Path, draw: Random) -> str:
    if path.is_file() or not (path / INDEX).is_file():
        raise NotApplicable
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    places = index["weight_map"]
    name, shards = draw.choice(sorted(places)), sorted(set(places.values()))
    shard = places[name]
    places[name] = draw.choice(
        ["missing.safetensors", "", ".", "config.json", "../x.safetensors", f"../input/{shard}",
         str((path / shard).resolve()), "/dev/zero", "a\0b", "\x1b[2J", "x" * 5000,
         *shards[:2], None, 3, ["a"]]
    )  # fmt: skip
    (path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return f"{INDEX}: {name} in {places[name]!r:.80}"


def _stale_copy(path: Path, draw: Random) -> str:
    """Another value of a tensor in a shard that the index does not name for it."""
    if path.is_file() or not (path / INDEX).is_file():
        raise NotApplicable
    places = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    name = draw.choice(sorted(places))
    others = sorted(set(places.values()) - {places[name]})
    if not others:
        raise NotApplicable
    source, file = File(path / places[name]), File(path / draw.choice(others))
    entry = dict(source.header[name])
    start, end = entry["data_offsets"]
    entry["data_offsets"] = [len(file.data), len(file.data) + end - start]
    file.header[name] = entry
    file.data += bytes(end - start)
    file.write()
    return f"{file.path.name}: a stale copy of {name}"


def _reshard(path: Path, draw: Random) -> str:
    """The same tensors in other files."""
    if path.is_file() or not list(path.glob("model*.safetensors")):
        raise NotApplicable
    tensors: dict[str, tuple[dict[str, Any], bytes]] = {}
    metadata: dict[str, Any] = {}
    for shard in sorted(path.glob("model*.safetensors")):
        file = File(shard)
        metadata |= file.header.get("__metadata__", {})
        for name in file.names(draw):
            start, end = file.header[name]["data_offsets"]
            tensors[name] = file.header[name], bytes(file.data[start:end])
        shard.unlink()
    (path / INDEX).unlink(missing_ok=True)
    count = draw.choice([1, 2, 3])
    names = ["model.safetensors"] if count == 1 else [
        f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)
    ]  # fmt: skip
    placed = {name: draw.choice(names) for name in sorted(tensors)}
    for file_name in sorted(set(placed.values())):
        header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
        data = b""
        ours = [name for name in placed if placed[name] == file_name]
        draw.shuffle(ours)
        for name in ours:
            entry, values = tensors[name]
            header[name] = entry | {"data_offsets": [len(data), len(data) + len(values)]}
            data += values
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (path / file_name).write_bytes(struct.pack("<Q", len(text)) + text + data)
    if count > 1:
        total = sum(len(values) for _, values in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return f"{count} files of weights"


HEADERS = [
    Mutation("safetensors header value", _header_value),
    Mutation("safetensors header field", _header_field),
    Mutation("safetensors header length", _header_length),
]
TENSORS = [
    Mutation("tensor not finite", _not_finite),
    Mutation("tensor of zeros", _zero_tensor),
    Mutation("tensor renamed", _rename_tensor),
    Mutation("tensor left out", _drop_tensor),
]
INDEX_ENTRY = Mutation("index entry", _index_entry)
STALE_COPY = Mutation("stale copy", _stale_copy, Effect.HARMLESS)
RESHARD = Mutation("resharded", _reshard, Effect.HARMLESS)
