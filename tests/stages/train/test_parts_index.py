"""Checkpoints of several processes, whose index is a pickle: read without running it."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from molcli.cli import main as command
from molcli.config.recipe import save_recipe
from molcli.config.sections import Recipe
from molcli.model.checkpoint import open_checkpoint
from molcli.stages.train import train
from molcli.stages.train.checkpoint_folder import newest_checkpoint, write_sums
from molcli.stages.train.checkpoint_reader import load_checkpoint
from molcli.stages.train.optimizer import make_optimizer
from molcli.stages.train.state import TrainState
from tests.stages.train.stopped_run import NORM, SETTINGS, Attack, Run


@pytest.fixture
def parts(run: Run) -> tuple[Path, TrainState]:
    """The newest checkpoint as several processes write it, and a state to read it into."""
    state = fresh_state(run.checkpoint)
    saved = newest_checkpoint(run.out / "checkpoints")
    assert saved is not None
    load_checkpoint(state, saved)
    tensors = torch.load(run.newest / "state.pt", weights_only=True)
    with pytest.warns(UserWarning, match="torch.distributed"):
        save(state.tensors_by_name(), storage_writer=FileSystemWriter(run.newest))
    torch.save({name: tensors[name] for name in ("rng", "cuda_rng")}, run.newest / "generators.pt")
    (run.newest / "state.pt").unlink()
    write_sums(run.newest)
    return run.newest, state


def fresh_state(checkpoint: Path) -> TrainState:
    model = open_checkpoint(checkpoint, torch.device("cpu"))
    return TrainState(model, make_optimizer(model, SETTINGS))


def test_parts_continue_to_the_same_end(
    run: Run, parts: tuple[Path, TrainState], tmp_path: Path
) -> None:
    train(run.checkpoint, tmp_path / "whole", run.data, Recipe(train=SETTINGS))
    run.resume()
    one, two = (load_file(f / "model.safetensors") for f in (tmp_path / "whole", run.out))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_bits_that_flip_in_parts_are_noticed(run: Run, parts: tuple[Path, TrainState]) -> None:
    for name in (".metadata", "__0_0.distcp", "generators.pt"):
        whole = (parts[0] / name).read_bytes()
        middle = len(whole) // 2
        (parts[0] / name).write_bytes(
            whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
        )
        assert f"{name} is not as it was written" in run.refused()
        (parts[0] / name).write_bytes(whole)


def test_code_in_an_index_does_not_run(
    run: Run,
    parts: tuple[Path, TrainState],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = tmp_path / "made"
    (parts[0] / ".metadata").write_bytes(pickle.dumps(Attack(made)))
    write_sums(parts[0])
    save_recipe(Recipe(train=SETTINGS), tmp_path / "recipe.yaml")
    words = ["molcli", "train", run.checkpoint, run.out, "--data", run.data, "--resume"]
    words += ["--recipe", tmp_path / "recipe.yaml"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "step-00000004 cannot be read" in said and ".mkdir, which no index holds" in said
    assert not made.exists()
    # Within an object that is known.
    index = Metadata({}, Attack(made))
    (parts[0] / ".metadata").write_bytes(pickle.dumps(index))
    write_sums(parts[0])
    assert "which no index holds" in run.refused()
    assert not made.exists()


def edit(folder: Path, change: Callable[[Metadata], object]) -> None:
    """Change an index of ours, which torch may therefore unpickle."""
    index = FileSystemReader(folder).read_metadata()
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    write_sums(folder)


def first_storage(index: Metadata) -> Any:
    return next(iter(index.storage_data.values()))


def first_tensor(index: Metadata) -> Any:
    return index.state_dict_metadata[f"model.{NORM}"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i: i.state_dict_metadata.pop(f"model.{NORM}"), "other tensors"),
        (lambda i: i.state_dict_metadata.update({"more": first_tensor(i)}), "other tensors"),
        # torch would unpickle its data without limits.
        (
            lambda i: i.state_dict_metadata.update({f"model.{NORM}": BytesStorageMetadata()}),
            "no TensorStorageMetadata",
        ),
        (lambda i: setattr(first_storage(i), "relative_path", "../../state"), "names the file"),
        (lambda i: setattr(first_storage(i), "relative_path", "/etc/passwd"), "names the file"),
        (lambda i: setattr(first_storage(i), "length", 2**40), "shorter"),
        (lambda i: setattr(first_storage(i), "offset", -1), "impossible place"),
        (lambda i: setattr(first_storage(i), "transform_descriptors", ["zstd"]), "transformed"),
        (lambda i: setattr(first_tensor(i), "size", torch.Size([2**40])), "not torch.float32"),
        (lambda i: setattr(first_tensor(i), "chunks", []), "not all of it"),
        (lambda i: first_tensor(i).chunks.append(first_tensor(i).chunks[0]), "not all of it"),
        (lambda i: setattr(first_tensor(i).chunks[0], "sizes", torch.Size([64])), "outside"),
        (lambda i: setattr(first_tensor(i).properties, "dtype", torch.int8), "int8"),
        (lambda i: i.storage_data.clear(), "in no file"),
        (lambda i: setattr(i, "storage_data", None), "no storage_data"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    run: Run, parts: tuple[Path, TrainState], change: Callable[[Metadata], object], said: str
) -> None:
    edit(parts[0], change)
    found = run.refused()
    assert "step-00000004 cannot be read" in found
    assert said in found


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x04.",
        b"\x80\x04N.",
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # memo entry 2^31, an array in the unpickler of C
        b"\x80\x04\x8e" + b"\xff" * 8 + b".",  # bytes of length 2^64
        b"\x80\x04" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",  # nested a hundred thousand deep
        b"\x80\x04]" * 2**20,  # larger than an index of these files
    ],
)
def test_a_damaged_index_is_refused(run: Run, parts: tuple[Path, TrainState], data: bytes) -> None:
    (parts[0] / ".metadata").write_bytes(data)
    write_sums(parts[0])
    assert "step-00000004 cannot be read" in run.refused()
