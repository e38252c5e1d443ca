"""Files of a checkpoint that were changed, by accident or on purpose: refused, and never run."""

import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from molcli.config.sections import Recipe
from molcli.files.hidden_folders import make_hidden
from molcli.stages.train import train
from molcli.stages.train.checkpoint_folder import write_sums
from tests.stages.train.stopped_run import NORM, SETTINGS, Attack, Run


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
        ({"seconds": 1e400}, "1e400 is not a number"),
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
    make_hidden(folder / ".step-00000007.partial")
    (folder / ".step-00000007.partial" / "output").mkdir()
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
