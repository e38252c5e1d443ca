"""The demo's whole path on the real parent, with fewer layers and less text."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import molcli.model  # noqa: F401  (registers the model type)
from molcli.cli import main as command
from molcli.stages.train import train

SMALL = [
    "upcycle.layers=[28, 29]",
    "calibrate.tokens=2048",
    "calibrate.heldout_tokens=256",
    "sample.tokens=3072",
    "sample.length=64",
    "sample.batch_size=64",
    "train.tokens=6144",
    "train.batch_size=8",
    "train.micro_batch_size=8",
    "evaluate.tokens=768",
    "inspect.tokens=512",
]
TINY = [
    "upcycle.layers=[1]",
    "upcycle.num_blocks=3",
    "upcycle.top_k=1",
    "upcycle.d_thin=32",
    "upcycle.d_ff_thin=48",
    "calibrate.tokens=512",
    "calibrate.heldout_tokens=64",
    "calibrate.context_length=32",
    "sample.tokens=1024",
    "sample.length=32",
    "train.tokens=512",
    "train.context_length=32",
    "train.batch_size=4",
    "train.micro_batch_size=4",
    "evaluate.tokens=256",
    "inspect.tokens=256",
]


def demo(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: object) -> int:
    words = ["molcli", "demo", "--out", out, *arguments]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def sets(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


# The one test that fetches the parent and converts it: two at a time would wait for a lock.
def test_training_brings_the_real_model_nearer_to_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert demo(monkeypatch, out, "--recipe", "demo", *sets(SMALL)) == 0
    finally:
        torch.set_num_threads(threads)
    figures = json.loads((out / "demo.json").read_text())
    assert figures["parent"]["kl"] == 0
    assert 0 < figures["trained"]["kl"] < figures["upcycled"]["kl"]
    assert figures["parent"]["ce"] < figures["trained"]["ce"]
    assert figures["parent"]["params_active"] == figures["parent"]["params_total"]
    assert figures["trained"]["params_active"] < figures["trained"]["params_total"]
    assert figures["layers"] == {"of": 30, "converted": [28, 29]}
    routing = json.loads((out / "routing.json").read_text())
    assert [layer["layer"] for layer in routing["layers"]] == [28, 29]

    printed = capsys.readouterr().out
    assert "2 of 30 layers converted (28–29)" in printed
    assert str(out / "trained") in printed.replace("\n", "")
    text, heldout = (set((out / f"{name}.jsonl").open()) for name in ("text", "heldout"))
    assert not text & heldout

    model = AutoModelForCausalLM.from_pretrained(out / "trained")
    tokenizer = AutoTokenizer.from_pretrained(out / "trained")
    prompt = tokenizer("Gravity is", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > prompt.input_ids.shape[1]


def test_another_parent(
    tmp_path: Path, tiny_parent: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parent = tmp_path / "demo", tiny_parent("qwen3")
    assert demo(monkeypatch, out, "--parent", parent, "--recipe", "demo", *sets(TINY)) == 0
    figures = json.loads((out / "demo.json").read_text())
    assert set(figures["seconds"]) > {"sample", "upcycle", "train", "total"}
    assert figures["tokens"]["training"] == 512
    assert figures["tokens"]["text"] >= 1024 - 32  # a document more or less
    assert figures["layers"] == {"of": 2, "converted": [1]}
    assert set(figures["continuations"]) == {"parent", "trained"}


@pytest.mark.parametrize("settings, words", [
    (["upcycle.layers=[7]"], "`upcycle.layers` names layer 7, but the model has 2"),
    (["upcycle.d_thin=768"], "`upcycle.d_thin` is 768, but the model's width is 64"),
])  # fmt: skip
def test_a_misfit_is_refused_before_any_work(
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    words: str,
) -> None:
    out = tmp_path / "demo"
    parent = ["--parent", tiny_parent("llama"), "--recipe", "demo"]
    assert demo(monkeypatch, out, *parent, *sets(TINY + settings)) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def figures(out: Path) -> dict[str, Any]:
    """demo.json without what differs from run to run."""
    found: dict[str, Any] = json.loads((out / "demo.json").read_text())
    assert found.pop("seconds")["total"] > 0
    return found


def interrupt(*arguments: object, **keywords: object) -> None:
    raise KeyboardInterrupt


def interrupt_training(*arguments: Any, **keywords: Any) -> object:
    """After two of four steps."""

    def stop(done: int, total: int | None, note: str = "") -> None:
        if done >= 256:
            raise KeyboardInterrupt

    return train(*arguments, **(keywords | {"progress": stop}))


@pytest.mark.parametrize(
    "place, stop, finished",
    [
        ("molcli.api.sample", interrupt, 0),
        ("molcli.cli.demo._split", interrupt, 0),
        ("molcli.api.upcycle", interrupt, 1),
        ("molcli.api.evaluate", interrupt, 2),
        ("molcli.api.train", interrupt, 3),
        ("molcli.stages.train.train", interrupt_training, 3),
        ("molcli.api.inspect", interrupt, 5),
        ("molcli.cli.demo_report.continuations", interrupt, 6),
        ("molcli.cli.demo_report.show", interrupt, 7),
    ],
)
def test_an_interrupted_demo_goes_on_and_ends_as_another_one(
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    stop: Callable[..., object],
    finished: int,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "demo"
    words = ["--parent", tiny_parent("qwen3"), "--recipe", "demo", *sets(TINY)]
    words += sets(["train.checkpoint_every=1"])
    assert demo(monkeypatch, whole, *words) == 0
    with monkeypatch.context() as patch:
        patch.setattr(place, stop)
        assert demo(monkeypatch, out, *words, "--restart") == 130
    told = capsys.readouterr().err
    assert "finished stages are kept" in told
    command = shlex.split(told.split("resume: ")[1])
    assert command[:4] == ["molcli", "demo", "--out", str(out)]
    assert "--restart" not in command
    assert not (out / "demo.json").exists()

    assert demo(monkeypatch, out, *words) == 0
    assert capsys.readouterr().err.count("(done before)") == finished
    assert figures(out) == figures(whole)


def test_a_finished_demo_is_kept_unless_it_is_to_begin_again(
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "demo"
    words = ["--parent", tiny_parent("llama"), "--recipe", "demo", *sets(TINY)]
    assert demo(monkeypatch, out, *words) == 0
    before = figures(out)
    assert demo(monkeypatch, out, *words) == 2
    told = capsys.readouterr().err
    assert f"{out} holds a finished demo" in told
    assert f"molcli demo --out {out} --restart" in told

    mine = out / "longer" / "mine.txt"  # a result of the user's own, beside the demo's
    mine.parent.mkdir()
    mine.touch()
    assert demo(monkeypatch, out, *words, "--restart") == 0
    assert "(done before)" not in capsys.readouterr().err
    assert figures(out) == before
    assert mine.exists()


@pytest.mark.parametrize("family, settings, words", [
    ("llama", ["train.tokens=1024"], "train.tokens"),
    ("qwen3", [], "parent"),
])  # fmt: skip
def test_an_unfinished_demo_goes_on_with_its_own_settings_alone(
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    family: str,
    settings: list[str],
    words: str,
) -> None:
    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr("molcli.api.train", interrupt)
        llama = ["--parent", tiny_parent("llama"), "--recipe", "demo"]
        assert demo(monkeypatch, out, *llama, *sets(TINY)) == 130
    upcycled = (out / "upcycled" / "receipt.json").read_bytes()
    others = ["--parent", tiny_parent(family), "--recipe", "demo", *sets(TINY + settings)]
    assert demo(monkeypatch, out, *others) == 2
    told = capsys.readouterr().err
    assert f"holds an unfinished demo with other {words}\n" in told
    assert "--restart" in told
    assert (out / "upcycled" / "receipt.json").read_bytes() == upcycled

    assert demo(monkeypatch, out, *others, "--restart") == 0
    assert "(done before)" not in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--restart"]])
def test_a_foreign_folder_is_refused_before_the_parent_is_fetched(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    (tmp_path / "trained").mkdir()  # a name that the demo uses, too
    (tmp_path / "trained" / "mine").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert demo(monkeypatch, tmp_path, *words) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert (tmp_path / "trained" / "mine").exists()


def test_a_damaged_state_is_named(
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "demo-state.json").write_text("{")
    words = ["--parent", tiny_parent("llama"), "--recipe", "demo", *sets(TINY)]
    assert demo(monkeypatch, tmp_path, *words) == 2
    assert "demo-state.json is damaged" in capsys.readouterr().err
