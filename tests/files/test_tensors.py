"""Sharded safetensors folders: written and read back, and damage detected."""

import json
import os
import resource
import signal
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from molcli.errors import MolError
from molcli.files.tensors import INDEX, SINGLE, ShardedWriter, TensorReader, save_tensors


def write(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> ShardedWriter:
    folder.mkdir(exist_ok=True)
    writer = ShardedWriter(folder, max_shard_bytes=max_shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    return writer


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(600.0).reshape(6, 100)
    return {
        "small": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "view": base[2],
        "transposed": base.T,
        "scalar": torch.tensor(3.0),
        "big": torch.randn(1000, dtype=torch.float64),
    }


@pytest.mark.parametrize(("max_shard_bytes", "shards"), [(2**20, 1), (3000, 2), (1, 5)])
def test_written_tensors_are_read_back(
    tmp_path: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int, shards: int
) -> None:
    write(tmp_path, tensors, max_shard_bytes)
    reader = TensorReader(tmp_path)
    assert set(reader.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor)
        assert reader.read(name).dtype == tensor.dtype
        assert reader.tensors[name].shape == tuple(tensor.shape)
    names = {f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)} | {INDEX}
    assert {file.name for file in tmp_path.iterdir()} == ({SINGLE} if shards == 1 else names)
    for shard in reader.shards:
        with safe_open(shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_index_states_the_total_size(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write(tmp_path, tensors, 3000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2 * 2 + 400 + 2400 + 4 + 8000
    assert index["weight_map"].keys() == tensors.keys()


def test_full_shards_are_written_immediately(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, max_shard_bytes=400)
    for i in range(5):
        writer.add(str(i), torch.ones(100))
        assert len(list(tmp_path.iterdir())) == i, "each earlier tensor fills a shard"
    writer.close()


def test_no_weights_and_pickled_weights(tmp_path: Path) -> None:
    with pytest.raises(MolError, match="holds no weights"):
        TensorReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(MolError, match=r"only pickled weights \(pytorch_model.bin\)") as error:
        TensorReader(tmp_path)
    assert "save_pretrained" in error.value.hint


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
@pytest.mark.parametrize("max_shard_bytes", [2**20, 3000])
def test_truncated_shard(
    tmp_path: Path, tensors: dict[str, torch.Tensor], keep: int, max_shard_bytes: int
) -> None:
    write(tmp_path, tensors, max_shard_bytes)
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(MolError, match=shard.name) as error:
        TensorReader(tmp_path)
    assert "again" in error.value.hint


def test_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(MolError, match="not a whole safetensors file") as error:
        TensorReader(tmp_path)
    assert "git lfs pull" in error.value.hint


def test_missing_shard(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write(tmp_path, tensors, 3000)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MolError, match=r"model-00002-of-00002.safetensors is missing"):
        TensorReader(tmp_path)


def test_index_that_names_an_absent_tensor(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    write(tmp_path, tensors, 3000)
    save_file({"other": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(MolError, match=r"places big in model-00002\S+, which does not hold it"):
        TensorReader(tmp_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "cannot be read"),
        ("[]", "is not a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "weight_map is empty"),
        ('{"weight_map": ' + "[" * 100_000, "cannot be read"),
        ('{"weight_map": {"big": 3}}', "places big in 3"),
        ('{"weight_map": {"big": "../model.safetensors"}}', r"places big in \.\./model"),
        ('{"weight_map": {"big": "/etc/hostname"}}', "places big in /etc/hostname"),
        ('{"weight_map": {"big": ".."}}', r"places big in \.\."),
        ('{"weight_map": {"big": ""}}', "places big in "),
    ],
)
def test_unreadable_index(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(MolError, match=found):
        TensorReader(tmp_path)


def test_the_index_decides_between_two_shards_with_a_tensor(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    write(tmp_path, tensors, 3000)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    for shard, other in ((first, second), (second, first)):
        stale = dict.fromkeys(load_file(other), torch.tensor([7.0]))
        stale = {name: tensor.clone() for name, tensor in stale.items()}
        save_file(stale | load_file(shard), tmp_path / f"{shard.name}.new")
    for shard in (first, second):
        (tmp_path / f"{shard.name}.new").rename(shard)
    reader = TensorReader(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor)


def test_a_tensor_in_two_shards_that_the_index_lacks(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    write(tmp_path, tensors, 3000)
    for shard in tmp_path.glob("*.safetensors"):
        save_file(load_file(shard) | {"extra": torch.ones(1)}, shard)
    with pytest.raises(MolError, match="extra is in several shards"):
        TensorReader(tmp_path)


def test_shards_that_are_links_as_in_the_cache_of_the_hub(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    write(tmp_path / "blobs", tensors, 3000)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert torch.equal(TensorReader(tmp_path / "snapshot").read("big"), tensors["big"])


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": ONE | {"dtype": "F7"}}, 8),
        ({"a": ONE | {"shape": [3]}}, 8),
        ({"a": ONE | {"shape": [-2]}}, 8),
        ({"a": ONE | {"shape": [2.0]}}, 8),
        ({"a": ONE | {"shape": [2**62, 4]}}, 8),
        ({"a": ONE | {"shape": None}}, 8),
        ({"a": ONE | {"data_offsets": ["0", "8"]}}, 8),
        ({"a": ONE | {"data_offsets": [8, 0]}}, 8),
        ({"a": ONE, "b": ONE}, 16),  # overlap, with a gap behind
        ({"a": ONE | {"data_offsets": [4, 12]}}, 8),
        ({"a": 5}, 8),
        ([ONE], 8),
        ({"a": {"dtype": "F32"}}, 8),
    ],
    ids=str,
)
def test_a_header_that_is_not_that_of_the_data(tmp_path: Path, header: object, data: int) -> None:
    raw = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data))
    with pytest.raises(MolError, match=SINGLE) as error:
        TensorReader(tmp_path)
    assert "again" in error.value.hint


def test_a_header_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    for length in (2**31, 2**63, 10**8 + 1):
        with (tmp_path / SINGLE).open("wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(8 + min(length, 2**31))  # a hole, which takes no room on the disk
        with pytest.raises(MolError, match="not a whole safetensors file"):
            TensorReader(tmp_path)
    raw = b"[" * 100_000
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(MolError, match="not a whole safetensors file"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077])
def test_the_permissions_are_those_of_any_new_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask
    assert torch.equal(load_file(tmp_path / "a")["a"], torch.ones(2))


def test_a_full_disk_is_an_os_error_with_the_file(tmp_path: Path) -> None:
    """The limit of a file's size fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_tensors({"a": torch.ones(10_000)}, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.filename == str(tmp_path / "a")
