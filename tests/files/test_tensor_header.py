"""Headers of safetensors files: bounded, and all that they say checked against the file."""

import json
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from molcli.errors import MolError
from molcli.files.tensors import SINGLE, TensorReader

# by the size, or by the safetensors library
_REFUSED = rf"{SINGLE} (is not a whole|has \d+ bytes, but|has a header that cannot be read)"


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, header: str | bytes, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_a_header_that_safetensors_wrote(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    tensors = {"a": torch.ones(2, 3), "b": torch.tensor(1, dtype=torch.int64), "é": torch.ones(0)}
    save_file(tensors, path, {"format": "pt"})
    found = TensorReader(tmp_path).tensors
    assert {name: (info.shape, info.dtype) for name, info in found.items()} == {
        "a": ((2, 3), "F32"),
        "b": ((), "I64"),
        "é": ((0,), "F32"),
    }
    data = path.read_bytes()
    assert data[found["b"].start :][:8] == struct.pack("<q", 1)


@pytest.mark.parametrize("length", [2**31, 2**63, 2**64 - 1])
def test_a_length_beyond_the_file_is_not_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(MolError, match="not a whole safetensors file"):
        TensorReader(tmp_path)


def test_a_header_of_a_sparse_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**33))
        file.truncate(2**34)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MolError, match="is not a whole"):
        TensorReader(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[]",
        "null",
        "{" + f'"w": {json.dumps(entry([1], [0, 4]))}, ' * 2 + '"x": {}}',
        "{" + ", ".join([f'"w": {json.dumps(entry([1], [0, 4]))}'] * 2) + "}",
        "{}".encode("utf-16"),
        '{"__metadata__": {"a": 1}}',
        '{"__metadata__": "a"}',
    ],
)
def test_no_header(tmp_path: Path, header: str | bytes) -> None:
    write(tmp_path / SINGLE, header, bytes(4))
    with pytest.raises(MolError, match=_REFUSED):
        TensorReader(tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [
        entry([1], [0, 4], "F128"),
        entry([1], [0, 4], ["F32"]),
        entry([-1], [0, 4]),
        entry([True], [0, 4]),
        entry([1.0], [0, 4]),
        entry("1", [0, 4]),
        entry([2**40, 2**40], [0, 4]),
        entry([0, 2**70], [0, 0]),
        entry([1], [0, 4.0]),
        entry([1], [False, 4]),
        entry([1], [4, 0]),
        entry([1], [0, 4, 8]),
        entry([1], [0, 8]),
        entry([1], [-4, 0]),
        entry([1], [0, 2**62]),
        {"dtype": "F32", "shape": [1]},
        [],
        None,
        3,
    ],
)
def test_an_entry_that_no_tensor_has(tmp_path: Path, tensor: Any) -> None:
    write(tmp_path / SINGLE, json.dumps({"w": tensor}), bytes(4))
    with pytest.raises(MolError, match=_REFUSED):
        TensorReader(tmp_path)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, json.dumps({"\ud800": entry([1], [0, 4])}), bytes(4))
    with pytest.raises(MolError, match=_REFUSED):
        TensorReader(tmp_path)


@pytest.mark.parametrize(
    ("offsets", "size"),
    [([[0, 4], [0, 4]], 8), ([[0, 4], [2, 6]], 8), ([[0, 4], [8, 12]], 12), ([[4, 8]], 8)],
)
def test_tensors_that_overlap_or_leave_bytes(
    tmp_path: Path, offsets: list[list[int]], size: int
) -> None:
    header = {str(i): entry([1], place) for i, place in enumerate(offsets)}
    write(tmp_path / SINGLE, json.dumps(header), bytes(size))
    with pytest.raises(MolError, match=_REFUSED):
        TensorReader(tmp_path)


@pytest.mark.parametrize("size", [3, 5])
def test_a_file_of_another_size(tmp_path: Path, size: int) -> None:
    write(tmp_path / SINGLE, json.dumps({"w": entry([1], [0, 4])}), bytes(size))
    with pytest.raises(MolError, match="but its header describes"):
        TensorReader(tmp_path)
