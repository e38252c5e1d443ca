"""What `molcli upcycle` prints at its end."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from molcli.cli import main as command

SMALL = [
    "upcycle.num_blocks=3",
    "upcycle.top_k=1",
    "upcycle.d_thin=16",
    "upcycle.receipt=full",
    "calibrate.tokens=256",
    "calibrate.heldout_tokens=64",
    "calibrate.context_length=32",
    "sample.length=32",
]


def upcycle(
    monkeypatch: pytest.MonkeyPatch, parent: Path, out: Path, *settings: str
) -> int | str | None:
    words = [word for setting in settings for word in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["molcli", "upcycle", str(parent), str(out), *words])
    monkeypatch.setenv("COLUMNS", "140")
    with pytest.raises(SystemExit) as stop:
        command.main()
    return stop.value.code


def test_the_tables_of_a_full_receipt(
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("molcli.stages.upcycle.comparison.NEW_TOKENS", 6)
    out = tmp_path / "out"
    assert upcycle(monkeypatch, tiny_parent("llama", num_hidden_layers=3), out, *SMALL) == 0
    printed = capsys.readouterr().out
    for word in (
        "this model",
        "layers skipped",
        "weight SVD",
        "depth-pruned parent",
        "sensitivity",
    ):
        assert word in printed
    assert str(out / "receipt.html") in printed
    assert (out / "receipt.html").is_file()


def test_an_exact_copy_without_text_has_no_tables(
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = ("upcycle.num_blocks=1", "upcycle.top_k=0", "upcycle.d_thin=64")
    assert upcycle(monkeypatch, tiny_parent("llama"), tmp_path / "out", *whole) == 0
    printed = capsys.readouterr().out
    assert "this model" not in printed
    assert str(tmp_path / "out") in printed


def test_a_start_of_full_width_is_measured_on_text(
    tmp_path: Path, tiny_parent: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only exact copies need none; a random start of that shape is none."""
    whole = ("upcycle.num_blocks=1", "upcycle.top_k=0", "upcycle.d_thin=64")
    random = (*whole, *SMALL[-4:], "upcycle.method=random")
    assert upcycle(monkeypatch, tiny_parent("llama"), tmp_path / "out", *random) == 0
