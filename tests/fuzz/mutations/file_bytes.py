"""Bytes of any file, and files that are of another kind than they should be."""

from pathlib import Path
from random import Random

from tests.fuzz.mutations.mutation import Effect, Mutation, NotApplicable, pick_file, shown


def _truncate(path: Path, draw: Random) -> str:
    file, content = _read(path, draw)
    size = draw.choice([1, 7, 8, 9, len(content) // 2, len(content) - 1, len(content) - 4])
    size = min(max(size, 0), len(content) - 1)
    file.write_bytes(content[:size])
    return f"{shown(file, path)}: the first {size} of {len(content)} bytes"


def _flip(path: Path, draw: Random) -> str:
    file, content = _read(path, draw)
    changed = bytearray(content)
    # Headers are short, and at the start.
    end = draw.choice([16, 512, len(content), len(content)])
    places = [draw.randrange(min(end, len(content))) for _ in range(draw.choice([1, 1, 1, 3]))]
    for place in places:
        changed[place] ^= 1 << draw.randrange(8)
    if changed == content:
        raise NotApplicable
    file.write_bytes(changed)
    return f"{shown(file, path)}: bits flipped at {places}"


def _zero(path: Path, draw: Random) -> str:
    file, content = _read(path, draw)
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.choice([1, 8, 100, 4096]))
    file.write_bytes(content[:start] + bytes(end - start) + content[end:])
    return f"{shown(file, path)}: zeros from {start} to {end}"


def _append(path: Path, draw: Random) -> str:
    file, content = _read(path, draw)
    tail = draw.choice([b"\0", b"\n", b"x", b"{}", b"\0" * 4096, content, draw.randbytes(50)])
    file.write_bytes(content + tail)
    return f"{shown(file, path)}: {len(tail)} bytes more"


def _insert(path: Path, draw: Random) -> str:
    file, content = _read(path, draw)
    place = draw.randrange(len(content) + 1)
    piece = draw.choice([b"\xff", b"\xef\xbb\xbf", b"\0" * 8, b"\r", b'"', b"]", b"\xed\xa0\x80"])
    file.write_bytes(content[:place] + piece + content[place:])
    return f"{shown(file, path)}: {piece!r} at {place}"


def _empty(path: Path, draw: Random) -> str:
    file = pick_file(path, draw)
    file.write_bytes(b"")
    return f"{shown(file, path)}: empty"


def _missing(path: Path, draw: Random) -> str:
    file = pick_file(path, draw)
    file.unlink()
    return f"{shown(file, path)}: missing"


def _folder(path: Path, draw: Random) -> str:
    file = pick_file(path, draw)
    file.unlink()
    file.mkdir()
    return f"{shown(file, path)}: a folder"


def _symlink(path: Path, draw: Random) -> str:
    file = pick_file(path, draw)
    target = draw.choice(["nowhere", file.name, "/dev/null", "/dev/zero", "."])
    file.unlink()
    file.symlink_to(target)
    return f"{shown(file, path)}: a link to {target}"


def _swap(path: Path, draw: Random) -> str:
    file, other = pick_file(path, draw), pick_file(path, draw)
    if file == other:
        raise NotApplicable
    file.write_bytes(other.read_bytes())
    return f"{shown(file, path)}: with the content of {shown(other, path)}"


def _read(path: Path, draw: Random) -> tuple[Path, bytes]:
    file = pick_file(path, draw)
    content = file.read_bytes()
    if not content:
        raise NotApplicable
    return file, content


_DAMAGE = {
    "truncated": _truncate,
    "bits flipped": _flip,
    "range zeroed": _zero,
    "bytes appended": _append,
    "bytes inserted": _insert,
}
_KINDS = {
    "empty file": _empty,
    "file missing": _missing,
    "folder for file": _folder,
    "link for file": _symlink,
    "other file": _swap,
}
BYTES = [Mutation(name, change) for name, change in _DAMAGE.items()]
# Of files whose sums are written beside them.
BYTES_WITH_SUMS = [Mutation(name, change, Effect.SAME) for name, change in _DAMAGE.items()]
FILE_KINDS = [Mutation(name, change) for name, change in _KINDS.items()]
FILE_KINDS_WITH_SUMS = [Mutation(name, change, Effect.SAME) for name, change in _KINDS.items()]
