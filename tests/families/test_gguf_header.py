"""Counts, lengths and offsets of a GGUF header are bounded by the file before it is read."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from molcli.errors import MolError
from molcli.families.gguf_header import GgufHeader, read_gguf_header

BLOCKS = {0: (1, 4), 2: (32, 18)}  # float32, Q4_0
HUGE = 2**31
U32, STRING, ARRAY = 4, 8, 9


def text(content: str | bytes, order: str = "<") -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return struct.pack(f"{order}Q", len(content)) + content


def number(key: str, value: int, order: str = "<") -> bytes:
    return text(key, order) + struct.pack(f"{order}II", U32, value)


def array(key: str, kind: int, count: int, content: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", ARRAY, kind, count) + content


def tensor(name: str, shape: tuple[int, ...], offset: int = 0, kind: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def file_of(
    keys: list[bytes],
    tensors: list[bytes] | None = None,
    data: int = 256,
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    tensors = tensors or []
    found = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, *found) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32 + data)


@pytest.fixture
def header(tmp_path: Path) -> Callable[[bytes], GgufHeader]:
    def read(content: bytes) -> GgufHeader:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return read_gguf_header(path, BLOCKS)

    return read


def test_values_and_shapes(header: Callable[[bytes], GgufHeader]) -> None:
    keys = [
        number("llama.block_count", 2),
        text("general.name") + struct.pack("<I", STRING) + text("x" * 1000),
        array("numbers", U32, 2, struct.pack("<II", 1, 2)),
        array("words", STRING, 2, text("a") + text("bc")),
        text("half") + struct.pack("<If", 6, 0.5),
    ]
    found = header(file_of(keys, [tensor("a", (8, 4)), tensor("b", (32,), 128, kind=2)]))
    assert found.tensors == {"a": (8, 4), "b": (32,)}
    assert found.values["llama.block_count"] == 2
    assert found.values["half"] == 0.5
    assert set(found.values["general.name"]) == {"x"}
    assert found.values["words"] is None


def test_the_other_order_of_bytes(header: Callable[[bytes], GgufHeader]) -> None:
    content = b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + number("llama.block_count", 2, ">")
    assert header(content).values == {"llama.block_count": 2}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGML" + file_of([])[4:],
        file_of([], version=1),
        file_of([], version=99),
        file_of([], counts=(0, HUGE)),
        file_of([], counts=(HUGE, 0)),
        file_of([], counts=(0, 2**63)),
        file_of([], counts=(0, 3)),
        file_of([struct.pack("<Q", HUGE) + b"key"]),
        file_of([struct.pack("<Q", 2**64 - 1) + b"key"]),
        file_of([text(b"\xff\xfe") + struct.pack("<II", U32, 1)]),
        file_of([text("key") + struct.pack("<IQ", STRING, HUGE)]),
        file_of([text("key") + struct.pack("<IQ", 77, 0)]),
        file_of([number("key", 1), number("key", 2)]),
        file_of([array("key", U32, HUGE)]),
        file_of([array("key", U32, 2**62)]),
        file_of([array("key", U32, 2**20)]),
        file_of([array("key", STRING, HUGE)]),
        file_of([array("key", STRING, 1, struct.pack("<Q", HUGE))]),
        file_of([array("key", ARRAY, 1)]),
        file_of([array("key", 0, 2**21 + 1)], data=2**22),  # one byte each: all in the file
        file_of([number("general.alignment", 0)]),
        file_of([number("general.alignment", 3)]),
        file_of([number("general.alignment", HUGE)]),
        file_of([], [tensor("a", (8,)), tensor("a", (8,), 32)]),
        file_of([], [tensor("a", (65,))]),
        file_of([], [tensor("a", (HUGE, HUGE))]),
        file_of([], [tensor("a", (2**63, 2))]),
        file_of([], [tensor("a", (0,))]),
        file_of([], [tensor("a", ())]),
        file_of([], [tensor("a", (1, 1, 1, 1, 1))]),
        file_of([], [tensor("a", (8,), 2**40)]),
        file_of([], [tensor("a", (8,), 2**64 - 32)]),
        file_of([], [tensor("a", (8,), 5)]),
        file_of([], [tensor("a", (8,), kind=99)]),
        file_of([], [tensor("a", (33,), kind=2)]),
    ],
)
def test_what_the_file_cannot_hold_is_refused(
    header: Callable[[bytes], GgufHeader], content: bytes
) -> None:
    with pytest.raises(MolError, match="damaged or not a GGUF file"):
        header(content)


def test_every_cut_is_refused(header: Callable[[bytes], GgufHeader]) -> None:
    whole = file_of([number("llama.block_count", 2)], [tensor("a", (64,))])
    header(whole)
    for length in range(len(whole)):
        with pytest.raises(MolError, match="damaged or not a GGUF file"):
            header(whole[:length])


def test_a_part_of_a_split_file_is_named_as_such(header: Callable[[bytes], GgufHeader]) -> None:
    with pytest.raises(MolError, match="is part 2 of 3 of a split GGUF file") as error:
        header(file_of([number("split.no", 1), number("split.count", 3)]))
    assert "llama-gguf-split --merge" in error.value.hint
    header(file_of([number("split.no", 0), number("split.count", 1)]))
