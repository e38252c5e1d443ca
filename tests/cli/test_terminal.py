"""Names with control characters and markup, in all commands: printed as text, with status 2."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Forked, Outcome

EVIL = "x\x1b[31m\x9b[red]\u202e[/]\r"
SHOWN = r"x\x1b[31m\x9b[red]\u202e[/]"


def run(forked: Forked, folder: Path, *words: object, **fields: Any) -> Outcome:
    done = forked.run(words, folder, env={"HOME": str(folder), "TMPDIR": str(folder)}, **fields)
    assert done.code in (0, 2), done.stderr
    for stream in (done.stdout, done.stderr):
        assert not set(stream) & set("\x1b\x9b\u202e\r\x07"), stream
        assert "Traceback" not in stream
    return done


@pytest.mark.parametrize(
    "words",
    [
        [EVIL],
        ["data", EVIL],
        ["plan", EVIL],
        ["plan", "x", "--gpu", EVIL],
        ["plan", "x", "--active", EVIL],
        ["plan", "x", "--tokens", EVIL],
        ["plan", "x", f"--{EVIL}"],
        ["upcycle", EVIL, "out"],
        ["upcycle", "x", "out", "--recipe", EVIL],
        ["upcycle", "x", "out", "--preset", EVIL],
        ["upcycle", "x", "out", "--set", EVIL],
        ["upcycle", "x", "out", "--set", f"upcycle.layers={EVIL}"],
        ["upcycle", "x", "out", "--set", f"{EVIL}.layers=1"],
        ["upcycle", "x", "out", "--set", f"upcycle.{EVIL}=1"],
        ["upcycle", "x", "out", "--data", f"{EVIL}=-1"],
        ["calibrate", EVIL, "out", "--data", EVIL],
        ["convert", EVIL, "out"],
        ["convert", "x", "out", "--gated-deltanet", EVIL],
        ["train", EVIL, "out", "--data", EVIL],
        ["train", "x", "out", "--gpus", EVIL],
        ["inspect", EVIL, "--data", EVIL],
        ["eval", EVIL],
        ["bench", EVIL],
        ["bench", "--recipe", "paper-80m-1+2of5", "--only", EVIL],
        ["bench", EVIL, "--seed", EVIL],
        ["bench", "--recipe", EVIL],
        ["init", EVIL, "out"],
        ["init", "demo", EVIL],
        ["demo", "--parent", EVIL, "--out", "demo"],
        ["data", "sample", EVIL, "out.jsonl"],
        ["data", "tokenize", EVIL, "out", "-t", EVIL],
        ["data", "tokenize", "x", "out", "-t", "x", "--tokens", EVIL],
        ["data", "cache-logits", EVIL, "out", "--data", EVIL],
        ["data", "cache-logits", "x", "out", "--top-k", "9" * 5000],
        ["eval", os.fsdecode(b"\xff\xfe")],
        ["plan", os.fsdecode(b"\xff"), "--json", os.fsdecode(b"\xfe/x")],
    ],
    ids=lambda words: ascii(" ".join(words))[:40],
)
def test_no_argument_controls_the_terminal(
    forked: Forked, tmp_path: Path, words: list[str]
) -> None:
    assert run(forked, tmp_path, *words).code == 2


@pytest.fixture
def evil(tiny_parent: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with such a name, and in it a parent with such a name."""
    folder = tmp_path / EVIL
    (folder / EVIL).parent.mkdir(parents=True)  # the name has a slash
    shutil.move(tiny_parent("llama"), folder / EVIL)
    return folder


SMALL = [
    *("-s", "upcycle.num_blocks=3", "-s", "upcycle.top_k=1", "-s", "upcycle.d_thin=32"),
    *("-s", "calibrate.tokens=256", "-s", "calibrate.heldout_tokens=64"),
    *("-s", "calibrate.context_length=16", "-s", "sample.length=16"),
]
READ = [
    *("-s", "evaluate.context_length=16", "-s", "inspect.context_length=16"),
    *("-s", "evaluate.recall_sequences=0"),
]


def test_folders_and_files_with_such_names_work_and_are_shown_as_text(
    forked: Forked, evil: Path, tmp_path: Path
) -> None:
    parent, data, out = evil / EVIL, evil / f"{EVIL}.txt", evil / "out"
    data.write_text("the quick brown fox jumps over the lazy dog\n\n" * 60)
    up = run(forked, evil, "upcycle", parent, out, "--data", data, *SMALL)
    assert up.code == 0 and rf"{SHOWN}\r/out" in up.stdout.replace("\n", "")
    page = (out / "receipt.html").read_text(encoding="utf-8")
    assert not set(page) & set("\x1b\x9b\u202e\r")
    evaluated = run(forked, evil, "eval", out, "--parent", parent, "--data", data, *READ)
    assert evaluated.code == 0
    routing = run(forked, evil, "inspect", out, "--data", data, *READ)
    assert routing.code == 0
    planned = run(forked, evil, "plan", parent)
    assert planned.code == 0 and SHOWN in planned.stdout


def reencode(encoding: str) -> None:
    """In the command's process, before it starts."""
    sys.stdout.reconfigure(encoding=encoding)  # type: ignore[union-attr]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_that_cannot_encode_a_table_gets_escapes(
    tiny_parent: Callable[..., Path], forked: Forked, tmp_path: Path, encoding: str
) -> None:
    setup = {"setup": "tests.cli.test_terminal:reencode", "payload": encoding}
    done = run(forked, tmp_path, "plan", tiny_parent("llama"), **setup)
    assert done.code == 0
    assert "8 slices" in done.stdout
    assert "\\u2500" in done.stdout or "×" not in done.stdout
