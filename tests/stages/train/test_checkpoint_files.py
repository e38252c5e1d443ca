"""Files of a checkpoint that were changed, by accident or on purpose: refused, and never run."""

import json
import os
import pickle
import random
import shutil
import sys
import zipfile
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
from molcli.config.sections import Recipe, TrainConfig
from molcli.errors import MolError
from molcli.model.checkpoint import open_checkpoint
from molcli.stages.train import train
from molcli.stages.train.checkpoint_folder import newest_checkpoint, write_sums
from molcli.stages.train.checkpoint_reader import load_checkpoint
from molcli.stages.train.optimizer import make_optimizer
from molcli.stages.train.state import TrainState

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_structures": ["dense", "mixture"],
    "layer_mixers": ["attention", "attention"],
}
SETTINGS = TrainConfig(
    tokens=8 * 2 * 16,
    context_length=16,
    batch_size=2,
    micro_batch_size=1,
    checkpoint_every=2,
    log_every=1,
    precision="fp32",
)


class Stopped(Exception):
    pass


class Run:
    """A run that stopped after five of eight steps, with checkpoints of the second and fourth."""

    def __init__(self, checkpoint: Path, data: str, out: Path) -> None:
        self.checkpoint, self.data, self.out = checkpoint, data, out
        with pytest.raises(Stopped):
            train(checkpoint, out, data, Recipe(train=SETTINGS), progress=self.stop)
        self.newest = out / "checkpoints" / "step-00000004"

    @staticmethod
    def stop(done: int, total: int | None, note: str = "") -> None:
        if note and done == 5 * 2 * 16:
            raise Stopped

    def resume(self) -> None:
        train(self.checkpoint, self.out, self.data, Recipe(train=SETTINGS), resume=True)

    def refused(self) -> str:
        """The message, after a look that nothing was written."""
        with pytest.raises(MolError) as refused:
            self.resume()
        assert not (self.out / "config.json").exists()
        return str(refused.value)


@pytest.fixture
def run(tiny_mol: Callable[..., Path], corpus: Callable[..., str], tmp_path: Path) -> Run:
    return Run(tiny_mol(**SMALL), corpus(), tmp_path / "out")


@pytest.mark.parametrize("name", ["state.pt", "progress.json", "sums.json"])
def test_a_flipped_bit_is_noticed(run: Run, name: str) -> None:
    file = run.newest / name
    whole = file.read_bytes()
    drawn = random.Random(name)
    for _ in range(5):
        changed = bytearray(whole)
        changed[drawn.randrange(len(whole))] ^= 1 << drawn.randrange(8)
        file.write_bytes(changed)
        said = run.refused()
        assert f"{run.newest} cannot be read" in said
        assert f"move or remove {run.newest}" in said
        assert "continues from " in said and "step-00000002" in said
    file.write_bytes(whole)
    run.resume()


def test_a_missing_file_and_one_of_another_run_are_noticed(run: Run) -> None:
    (run.newest / "sums.json").rename(run.out / "kept.json")
    assert "sums.json is missing" in run.refused()
    (run.out / "kept.json").rename(run.newest / "sums.json")
    (run.newest / "generators.pt").write_bytes(b"")
    assert "generators.pt was not written with the rest" in run.refused()
    (run.newest / "generators.pt").unlink()
    (run.newest / "state.pt").unlink()
    assert "state.pt is missing" in run.refused()


def test_the_checkpoint_before_continues_to_the_same_end(run: Run, tmp_path: Path) -> None:
    train(run.checkpoint, tmp_path / "whole", run.data, Recipe(train=SETTINGS))
    run.newest.rename(tmp_path / "moved")
    run.resume()
    one, two = (load_file(f / "model.safetensors") for f in (tmp_path / "whole", run.out))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_of_an_earlier_version_is_read(run: Run) -> None:
    """It has no sums, and NaN for a loss that was not known would not be JSON."""
    progress = json.loads((run.newest / "progress.json").read_text())
    del progress["format"]
    (run.newest / "progress.json").write_text(json.dumps(progress))
    (run.newest / "sums.json").unlink()
    run.resume()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"state": None}, "has state: None"),
        ({"identity": []}, "has identity: []"),
        ({"format": 99}, "has format 99"),
        ({"step": "4"}, "has step: 4"),
        ({"step": True}, "has step: True"),
        ({"step": -4}, "has step: -4"),
        ({"step": 10**30}, "has step: 1000"),
        ({"step": 5}, "step is 5, not 4"),
        ({"row": 9}, "row is 9, not 8"),
        ({"tokens": 1}, "tokens is 1, not 128"),
        ({"stage": 1}, "stage 1 does not have"),
        ({"stage_step": 9}, "stage 0 does not have"),
        ({"skipped": 5}, "skipped 5 steps"),
        ({"loss": "none"}, "has loss: none"),
        ({"seconds": 1e400}, "has seconds: inf"),
        ({"seconds": [1]}, "has seconds: [1]"),
        ({"model": 1}, "lacks, or has too much: model"),
    ],
)
def test_counters_that_cannot_be_are_refused(run: Run, change: dict[str, Any], said: str) -> None:
    progress = json.loads((run.newest / "progress.json").read_text())
    part = progress if change.keys() <= progress.keys() else progress["state"]
    part |= change
    text = json.dumps(progress).replace("Infinity", "1e400")
    (run.newest / "progress.json").write_text(text)
    write_sums(run.newest)
    assert said in run.refused()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"state": {}}', "[" * 10**5, "\xff"])
def test_a_malformed_progress_is_refused(run: Run, text: str) -> None:
    (run.newest / "progress.json").write_bytes(text.encode("latin-1"))
    write_sums(run.newest)
    assert f"{run.newest} cannot be read" in run.refused()


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def test_code_in_a_state_does_not_run(run: Run, tmp_path: Path) -> None:
    torch.save({"model": Attack(tmp_path / "made")}, run.newest / "state.pt")
    write_sums(run.newest)
    assert f"{run.newest} cannot be read" in run.refused()
    (run.newest / "state.pt").write_bytes(pickle.dumps(Attack(tmp_path / "made")))
    write_sums(run.newest)
    assert "not a whole file of torch.save" in run.refused()
    assert not (tmp_path / "made").exists()


def change_state(run: Run, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = torch.load(run.newest / "state.pt", weights_only=True)
    change(tensors)
    torch.save(tensors, run.newest / "state.pt")
    write_sums(run.newest)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("model"), "model"),
        (lambda s: s["model"].pop(NORM), "other weights"),
        (lambda s: s["model"].update({NORM: torch.ones(3)}), "another shape"),
        (lambda s: s["model"].update({NORM: 5}), "another shape"),
        (lambda s: s["model"].update({NORM: s["model"][NORM].double()}), "dtype"),
        (lambda s: s["model"].update({NORM: torch.ones(1).expand(32)}), "another shape"),
        (lambda s: s["model"][NORM].fill_(float("nan")), f"the weights {NORM} are not finite"),
        (lambda s: s["optimizer"]["state"][0]["exp_avg"].fill_(float("inf")), "not finite"),
        (lambda s: s["optimizer"]["state"][0].pop("step"), "those of AdamW"),
        (lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.ones(3)), "another shape"),
        (lambda s: s["optimizer"]["state"].update({99: {}}), "not trained"),
        (lambda s: s["optimizer"]["param_groups"].pop(), "other groups"),
        (lambda s: s["optimizer"]["param_groups"][0].update(lr=float("nan")), "other settings"),
        (lambda s: s["optimizer"]["param_groups"][0].update(betas="no"), "other settings"),
        (lambda s: s["optimizer"]["param_groups"][0].update(params=[7]), "other settings"),
        (lambda s: s.update(rng=torch.ones(5, dtype=torch.uint8)), "random state"),
        (lambda s: s.update(rng=None), "random states"),
        (lambda s: s.update(cuda_rng=3), "random states"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    run: Run, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    change_state(run, change)
    found = run.refused()
    assert f"{run.newest} cannot be read" in found
    assert said in found


def test_a_compressed_state_is_refused(run: Run) -> None:
    """A small file could become a large one in memory."""
    plain = run.newest / "plain"
    (run.newest / "state.pt").rename(plain)
    with zipfile.ZipFile(plain) as whole:
        kind = zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(run.newest / "state.pt", "w", compression=kind) as packed:
            for entry in whole.infolist():
                packed.writestr(entry.filename, whole.read(entry))
    plain.unlink()
    write_sums(run.newest)
    assert "compressed" in run.refused()


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


def test_folders_of_the_user_stay(run: Run) -> None:
    """Names that are nearly ours, and a name of ours with other content."""
    folder = run.out / "checkpoints"
    for name in ("step-00000001-best", "step-7", "step-000000009", "step-00000009.old", "best"):
        (folder / name).mkdir()
        (folder / name / "state.pt").write_bytes(b"mine")
    (folder / "step-00000001").mkdir()
    (folder / "step-00000001" / "notes.txt").write_text("mine")
    (folder / "step-00000010").write_text("a file")
    shutil.copytree(run.newest, folder / "kept")
    (folder / "step-00000003").symlink_to(folder / "kept")
    before = {path.name for path in folder.iterdir()}
    run.resume()
    after = {path.name for path in folder.iterdir()}
    assert before - after == {"step-00000002", "step-00000004"}
    assert after - before == {"step-00000006", "step-00000008"}
    assert (folder / "step-00000001-best" / "state.pt").read_bytes() == b"mine"
    assert (folder / "step-00000001" / "notes.txt").read_text() == "mine"
    assert (folder / "kept" / "state.pt").is_file()


def test_what_a_killed_run_left_is_removed(run: Run) -> None:
    """Even of a step that is not saved now, as a signal or another recipe leaves it."""
    folder = run.out / "checkpoints"
    for name in (".step-00000003.partial", ".step-00000005.partial", ".step-3.partial"):
        (folder / name).mkdir()
        (folder / name / "state.pt").write_bytes(b"half")
    (folder / ".step-00000005.partial" / "notes.txt").write_text("mine")
    run.resume()
    left = sorted(path.name for path in folder.glob(".*"))
    assert left == [".step-00000005.partial", ".step-3.partial"]


def test_a_checkpoint_with_a_file_of_the_user_is_used_and_stays(run: Run) -> None:
    (run.newest / "notes.txt").write_text("the good one")
    run.resume()
    assert (run.newest / "notes.txt").read_text() == "the good one"
    assert (run.newest / "state.pt").is_file()


def test_a_name_of_ours_that_is_no_checkpoint_is_not_passed_over(run: Run) -> None:
    strange = run.out / "checkpoints" / "step-00000099"
    strange.mkdir()
    (strange / "notes.txt").write_text("mine")
    said = run.refused()
    assert "step-00000099 cannot be read" in said and "progress.json is missing" in said
    assert "continues from" in said and "step-00000004" in said
    assert (strange / "notes.txt").read_text() == "mine"
