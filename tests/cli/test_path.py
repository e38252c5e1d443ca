"""The commands one after another on a tiny parent: what each leaves is what the next one takes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from molcli.cli import main as command
from molcli.config.recipe import load_recipe

SMALL = [
    "upcycle.num_blocks=3",
    "upcycle.top_k=1",
    "upcycle.d_thin=32",
    "calibrate.tokens=512",
    "calibrate.heldout_tokens=128",
    "calibrate.context_length=32",
    "sample.length=32",
    "train.tokens=512",
    "train.context_length=32",
    "train.batch_size=4",
    "evaluate.context_length=32",
    "inspect.context_length=32",
]


def molcli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["molcli", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_from_a_parent_to_a_trained_and_inspected_model(
    tmp_path: Path, tiny_parent: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, out = tiny_parent("llama"), tmp_path / "out"
    small = [word for setting in SMALL for word in ("--set", setting)]
    data = tmp_path / "text.jsonl"
    draw = ["--set", "sample.tokens=640", "--set", "sample.length=32"]
    assert molcli(monkeypatch, "data", "sample", parent, data, *draw) == 0
    assert molcli(monkeypatch, "upcycle", parent, out / "upcycled", *small) == 0
    # The recipe that the checkpoint carries is in force from here on.
    recipe = load_recipe(out / "upcycled" / "recipe.yaml")
    assert recipe == load_recipe(None, SMALL)
    train = ["train", out / "upcycled", out / "trained", "--parent", parent, "--data", data]
    assert molcli(monkeypatch, *train) == 0
    assert load_recipe(out / "trained" / "recipe.yaml").upcycle == recipe.upcycle
    trained, figures, routing = out / "trained", tmp_path / "eval.json", tmp_path / "routing.json"
    evaluate = ["eval", trained, "--parent", parent, "--data", data, "--json", figures]
    assert molcli(monkeypatch, *evaluate) == 0
    assert molcli(monkeypatch, "inspect", trained, "--data", data, "--json", routing) == 0
    assert json.loads(figures.read_text())["kl"] > 0
    assert len(json.loads(routing.read_text())["layers"]) == 2
    assert sorted(path.name for path in out.iterdir()) == ["trained", "upcycled"]


def test_a_recipe_that_does_not_fit_is_refused_before_any_work(
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out" / "upcycled"
    wide = ["upcycle", tiny_parent("qwen2"), out, "--set", "upcycle.d_thin=1024"]
    assert molcli(monkeypatch, *wide) == 2
    error = capsys.readouterr().err
    assert "`upcycle.d_thin` is 1024, but the model's width is 64" in error
    assert "sampling" not in error
    assert not out.parent.exists()


def test_a_taken_output_is_refused_before_the_parent_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert molcli(monkeypatch, "upcycle", "no/parent", tmp_path) == 2
    assert "exists and is not empty" in capsys.readouterr().err
