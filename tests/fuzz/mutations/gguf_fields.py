"""GGUF files: counts, types, lengths and values of their header."""

from pathlib import Path
from random import Random

from tests.fuzz.mutations.mutation import Mutation, NotApplicable, pick_file, shown, some_number

_HEADER = {"magic": (0, 4), "version": (4, 4), "tensors": (8, 8), "fields": (16, 8)}


def _count(path: Path, draw: Random) -> str:
    file = pick_file(path, draw, "*.gguf")
    content = bytearray(file.read_bytes())
    name, (at, size) = draw.choice(sorted(_HEADER.items()))
    number = some_number(draw) % 256**size
    content[at : at + size] = number.to_bytes(size, "little")
    file.write_bytes(content)
    return f"{shown(file, path)}: {name} := {number}"


def _field(path: Path, draw: Random) -> str:
    """The type, the length or the value behind a name of a field or of a tensor."""
    file = pick_file(path, draw, "*.gguf")
    content = bytearray(file.read_bytes())
    names = [*_names(content)]
    if not names:
        raise NotApplicable
    start, end = draw.choice(names)
    # 0: the type of a field, or the dimensions of a tensor; then values, lengths, offsets.
    at, size = end + draw.choice([0, 4, 4, 8, 12, 16, 20]), draw.choice([4, 8])
    number = some_number(draw) % 256**size
    if draw.random() < 0.2:  # the length of the name itself
        at, size = start - 8, 8
    content[at : at + size] = number.to_bytes(size, "little")
    file.write_bytes(content)
    return f"{shown(file, path)}: {bytes(content[start:end])!r:.60} {at - end:+}: {number}"


def _name(path: Path, draw: Random) -> str:
    """Another name of the same length."""
    file = pick_file(path, draw, "*.gguf")
    content = bytearray(file.read_bytes())
    names = [*_names(content)]
    if not names:
        raise NotApplicable
    start, end = draw.choice(names)
    new = draw.choice([b"\xff", b"\x1b", b"x", b"\0", b"["]) * (end - start)
    old, content[start:end] = bytes(content[start:end]), new
    file.write_bytes(content)
    return f"{shown(file, path)}: {old!r:.60} is called {new[:4]!r}"


def _names(content: bytearray) -> list[tuple[int, int]]:
    """Where the names of fields and tensors lie: a length of 8 bytes, and as many letters."""
    found, at = [], 24
    while at < min(len(content) - 8, 20_000):
        size = int.from_bytes(content[at : at + 8], "little")
        text = content[at + 8 : at + 8 + size]
        if 4 <= size <= 60 and len(text) == size and b"." in text and text.isascii():
            found.append((at + 8, at + 8 + size))
            at += 8 + size
        else:
            at += 1
    return found


GGUF = [
    Mutation("GGUF count", _count),
    Mutation("GGUF field", _field),
    Mutation("GGUF name", _name),
]
