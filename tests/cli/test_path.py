"""The commands one after another on a tiny parent: what each leaves is what the next one takes."""

import json
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from molcli.cli import main as command
from molcli.config.recipe import load_recipe
from molcli.data.order import MixedOrder
from molcli.model.checkpoint import open_checkpoint
from molcli.model.parent import end_tokens

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
    "evaluate.num_prompts=4",
    "evaluate.prompt_length=4",
    "evaluate.continuation_length=3",
    "evaluate.recall_sequences=2",
    "evaluate.recall_pairs=1",
    "evaluate.recall_distances=[0, 8]",
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
    # Its text was sampled: with as many tokens as it needed.
    given = load_recipe(None, SMALL)
    needed = given.calibrate.tokens + given.calibrate.heldout_tokens
    assert recipe == replace(given, sample=replace(given.sample, tokens=needed))
    train = ["train", out / "upcycled", out / "trained", "--parent", parent, "--data", data]
    assert molcli(monkeypatch, *train) == 0
    assert load_recipe(out / "trained" / "recipe.yaml").upcycle == recipe.upcycle
    trained, figures, routing = out / "trained", tmp_path / "eval.json", tmp_path / "routing.json"
    evaluate = ["eval", trained, "--parent", parent, "--data", data, "--json", figures]
    assert molcli(monkeypatch, *evaluate) == 0
    assert molcli(monkeypatch, "inspect", trained, "--data", data, "--json", routing) == 0
    found = json.loads(figures.read_text())
    assert found["kl"] > 0
    assert found["generation"]["prompts"] == 4
    assert [row["distance"] for row in found["recall"]] == [0, 8]
    assert (found["tasks"], found["skipped"]) == ({}, {})
    # Recall needs neither data nor parent.
    assert molcli(monkeypatch, "eval", trained, "--json", figures) == 0
    assert json.loads(figures.read_text())["recall"][0]["parent"] is None
    assert len(json.loads(routing.read_text())["layers"]) == 2
    assert sorted(path.name for path in out.iterdir()) == ["trained", "upcycled"]


def test_how_the_parent_generates_reaches_what_is_made_of_it(
    tmp_path: Path, tiny_parent: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, out = tiny_parent("llama"), tmp_path / "out"
    # As on the Hub: transformers 5.17 refuses to write a temperature without do_sample.
    wanted = {
        "bos_token_id": 1,
        "eos_token_id": [2, 5, 9],
        "pad_token_id": 0,
        "temperature": 0.7,
        "top_p": 0.9,
    }
    (parent / "generation_config.json").write_text(json.dumps(wanted))
    small = [word for setting in SMALL for word in ("--set", setting)]
    data = tmp_path / "text.jsonl"
    draw = ["--set", "sample.tokens=640", "--set", "sample.length=32"]
    assert molcli(monkeypatch, "data", "sample", parent, data, *draw) == 0
    for line in data.read_text().splitlines():  # the parent's own text stops at all of them, too
        assert not {2, 5, 9} & set(json.loads(line)["input_ids"][1:-1])

    assert molcli(monkeypatch, "upcycle", parent, out / "up", *small, "--data", data) == 0
    train = ["train", out / "up", out / "trained", "--data", data]
    assert molcli(monkeypatch, *train) == 0
    convert = ["convert", out / "trained", out / "delta", "--gated-deltanet", "1", "--data", data]
    assert molcli(monkeypatch, *convert) == 0

    for name in ("up", "trained", "delta"):
        assert json.loads((out / name / "generation_config.json").read_text()) == wanted
        config = json.loads((out / name / "config.json").read_text())
        assert (config["eos_token_id"], config["pad_token_id"]) == ([2, 5, 9], 0)
        model = open_checkpoint(out / name, torch.device("cpu"))
        assert end_tokens(model) == [2, 5, 9]
        for end in (5, 9):
            always = LogitsProcessorList([lambda _, scores, end=end: one_hot(scores, end)])
            ids = torch.tensor([[3, 4]])
            found = model.generate(ids, max_new_tokens=6, logits_processor=always)
            assert found.tolist() == [[3, 4, end]]


def one_hot(scores: Tensor, token: int) -> Tensor:
    """(B, V), with `token` the likeliest."""
    return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([token]), 0.0)


def test_an_interrupted_run_prints_the_command_that_resumes_it(
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = ["upcycle.num_blocks=1", "upcycle.top_k=0", "upcycle.d_thin=64", "train.tokens=256"]
    small = [word for setting in SMALL + whole for word in ("--set", setting)]
    parent, upcycled, out = tiny_parent("llama"), tmp_path / "upcycled", tmp_path / "a folder"
    data = tmp_path / "text.jsonl"
    assert molcli(monkeypatch, "data", "sample", parent, data, "--set", "sample.tokens=320") == 0
    assert molcli(monkeypatch, "upcycle", parent, upcycled, "--data", data, *small) == 0
    indices, calls = MixedOrder.indices, []

    def interrupted(self: MixedOrder, first: int, count: int) -> Tensor:
        calls.append(first)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return indices(self, first, count)

    monkeypatch.setattr(MixedOrder, "indices", interrupted)
    capsys.readouterr()
    assert molcli(monkeypatch, "train", upcycled, out, "--data", data) == 143
    said = capsys.readouterr().err
    assert "step 1 of 2 of stage 0 pretrain is saved" in said
    (line,) = [line for line in said.splitlines() if line.startswith("resume: ")]
    words = shlex.split(line.removeprefix("resume: molcli "))
    assert words == ["train", str(upcycled), str(out), "--data", str(data), "--resume"]
    assert molcli(monkeypatch, *words) == 0
    assert (out / "config.json").is_file()
    assert calls == [0, 4, 4, 8]  # rows are taken a step ahead: the second step's twice


def test_convert_takes_its_text_from_a_file_a_calibration_or_the_parent(
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parent, start, calibration = tiny_parent("llama"), tmp_path / "start", tmp_path / "calibration"
    small = [word for setting in SMALL for word in ("--set", setting)]
    data = tmp_path / "text.jsonl"
    assert molcli(monkeypatch, "data", "sample", parent, data, "--set", "sample.tokens=640") == 0
    assert molcli(monkeypatch, "calibrate", parent, calibration, "--data", data, *small) == 0
    known = ["--calibration", calibration]
    assert molcli(monkeypatch, "upcycle", parent, start, *known, *small) == 0
    convert = ["convert", start]
    assert molcli(monkeypatch, *convert, tmp_path / "a", "--data", data) == 0
    assert molcli(monkeypatch, *convert, tmp_path / "b", *known) == 0
    listed = ["--parent", parent, "--gated-deltanet", "1"]
    assert molcli(monkeypatch, *convert, tmp_path / "c", *listed) == 0
    kinds = {
        name: [
            row["layer"]
            for row in json.loads((tmp_path / name / "convert.json").read_text())["layers"]
        ]
        for name in "abc"
    }
    assert kinds == {"a": [0, 1], "b": [0, 1], "c": [1]}
    # The same rows either way.
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    recipe = load_recipe(tmp_path / "c" / "recipe.yaml")
    assert recipe.convert.gated_deltanet == [1]
    assert recipe.upcycle == load_recipe(None, SMALL).upcycle
    # Without another text, that of the conversion, which the recipe in the checkpoint names.
    assert molcli(monkeypatch, *convert, tmp_path / "e") == 0
    assert (tmp_path / "e" / "model.safetensors").read_bytes() == (
        tmp_path / "a" / "model.safetensors"
    ).read_bytes()
    data.rename(tmp_path / "moved.jsonl")
    capsys.readouterr()
    assert molcli(monkeypatch, *convert, tmp_path / "d") == 2
    assert "text.jsonl` does not exist" in (error := capsys.readouterr().err)
    assert "--set calibrate.data=null" in error
    (tmp_path / "moved.jsonl").rename(data)
    for arguments, message in (
        (["--set", "calibrate.data=null"], "there is no text"),
        (["--data", data, "--gated-deltanet", "1,1"], "each layer once"),
        (["--data", data, "--gated-deltanet", "some"], "every:N"),
        (["--data", data, "--gated-deltanet", "2"], "names layer 2"),
    ):
        assert molcli(monkeypatch, *convert, tmp_path / "d", *arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


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


def test_eval_with_nothing_to_measure_says_what_is_missing(
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parent, out = tiny_parent("llama", tokenizer=False), tmp_path / "out"
    whole = ["num_blocks=1", "num_shared_blocks=1", "d_thin=64"]
    sets = [word for key in whole for word in ("--set", f"upcycle.{key}")]
    assert molcli(monkeypatch, "upcycle", parent, out, *sets) == 0
    capsys.readouterr()
    assert molcli(monkeypatch, "eval", out) == 2
    error = capsys.readouterr().err
    assert "nothing to measure" in error
    assert "no tokenizer" in error
    assert "--data" in error
    assert molcli(monkeypatch, "eval", out, "--include-path", tmp_path) == 2
    assert "there are no --tasks" in capsys.readouterr().err
