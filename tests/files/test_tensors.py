"""Sharded safetensors folders: written and read back, and damage detected."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

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


def test_files_are_as_readable_as_their_folder(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    new = tmp_path / "new"  # made under the same umask
    write(new, tensors, 2**20)
    assert (new / SINGLE).stat().st_mode & 0o666 == new.stat().st_mode & 0o666


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
    ("text", "problem"),
    [
        ("", "cannot be read"),
        ("[]", "is not a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "names no tensors"),
        ('{"weight_map": ["a"]}', "has weight_map"),
        ('{"weight_map":' + '{"a":' * 100_000, "cannot be read"),
    ],
)
def test_unreadable_index(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(MolError, match=problem):
        TensorReader(tmp_path)


def write_index(folder: Path, weight_map: dict[str, object]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("first", [True, False])
def test_the_index_decides_over_a_stale_duplicate(tmp_path: Path, first: bool) -> None:
    right, stale = {"w": torch.tensor([1.0])}, {"w": torch.tensor([9.0]), "v": torch.ones(2)}
    names = ["a.safetensors", "b.safetensors"]
    right_file, stale_file = names if first else reversed(names)
    save_file(right, tmp_path / right_file)
    save_file(stale, tmp_path / stale_file)
    write_index(tmp_path, {"w": right_file, "v": stale_file})
    reader = TensorReader(tmp_path)
    assert reader.read("w").item() == 1
    assert reader.tensors["w"].shard.name == right_file
    assert {name: x.numel() for name, x in reader.read_all().items()} == {"w": 1, "v": 2}


def test_a_duplicate_that_the_index_does_not_name(tmp_path: Path) -> None:
    for file in ("a", "b"):
        save_file({file: torch.ones(1), "w": torch.ones(1)}, tmp_path / f"{file}.safetensors")
    write_index(tmp_path, {file: f"{file}.safetensors" for file in "ab"})
    with pytest.raises(MolError, match=r"w is in a\.safetensors and in b\.safetensors"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("shard", ["{outside}", "../outside.safetensors", "sub/w", "..", "", 3])
def test_an_index_that_leaves_its_folder(tmp_path: Path, shard: object) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"w": torch.ones(1)}, outside)
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    save_file({"w": torch.ones(1)}, folder / "sub" / "w")
    write_index(folder, {"w": str(outside) if shard == "{outside}" else shard})
    with pytest.raises(MolError, match="places w in") as error:
        TensorReader(folder)
    assert "by their names alone" in error.value.allowed


def test_a_shard_that_is_a_link_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    blob, folder = tmp_path / "blob", tmp_path / "snapshot"
    folder.mkdir()
    save_file({"w": torch.tensor([2.0])}, blob)
    (folder / "a.safetensors").symlink_to("../blob")
    write_index(folder, {"w": "a.safetensors"})
    assert TensorReader(folder).read("w").item() == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nothing_that_is_not_finite_is_written(tmp_path: Path, value: float) -> None:
    writer = ShardedWriter(tmp_path)
    writer.add("good", torch.ones(3, dtype=torch.float16))
    with pytest.raises(MolError, match="bad would be written with entries that are NaN"):
        writer.add("bad", torch.tensor([1.0, value], dtype=torch.bfloat16))


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    save_file({"w": torch.ones(100)}, tmp_path / SINGLE)
    reader = TensorReader(tmp_path)
    (tmp_path / SINGLE).write_bytes(b"short")
    with pytest.raises(MolError, match=f"{SINGLE} cannot be read"):
        reader.read("w")


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_tensors({"w": torch.ones(1)}, tmp_path / "new")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        save_tensors({"w": torch.ones(1)}, tmp_path / "none" / "new")
    assert missing.value.filename == str(tmp_path / "none" / "new")
