"""Sharded safetensors folders: written and read back, and damage detected."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from molcli.errors import MolError
from molcli.files.tensors import INDEX, SINGLE, ShardedWriter, TensorReader


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


def test_files_are_as_readable_as_their_folder(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    tmp_path.chmod(0o755)
    write(tmp_path, tensors, 2**20)
    assert (tmp_path / SINGLE).stat().st_mode & 0o777 == 0o644


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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}'])
def test_unreadable_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(MolError, match="cannot be read"):
        TensorReader(tmp_path)
