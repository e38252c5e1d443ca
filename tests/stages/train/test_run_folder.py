"""The folder of a run: one run writes it, and nothing in it that is not the run's is touched."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from molcli.config.sections import Recipe, TrainConfig
from molcli.errors import MolError
from molcli.files.hidden_folders import locked
from molcli.model import MoLForCausalLM
from molcli.stages.train import train

SETTINGS = TrainConfig(
    tokens=4 * 2 * 16,
    context_length=16,
    batch_size=2,
    micro_batch_size=1,
    checkpoint_every=1,
    log_every=1,
    precision="fp32",
)
RECIPE = Recipe(train=SETTINGS)
Make, Corpus = Callable[..., Path], Callable[..., str]


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT as in a terminal: a script's background processes are started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Stopped(Exception):
    pass


def stop_at_two(done: int, total: int | None, note: str = "") -> None:
    if note and done == 2 * 2 * 16:
        raise Stopped


def test_a_second_run_is_refused_while_the_first_writes(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    """At the first run's first step, and before it: both found the path free."""
    checkpoint, data, out = tiny_mol(), corpus(), tmp_path / "out"
    said: list[str] = []

    def start_another(done: int, total: int | None, note: str = "") -> None:
        for resume in (False, True) if note else ():
            with pytest.raises(MolError) as refused:
                train(checkpoint, out, data, RECIPE, resume=resume)
            said.append(str(refused.value))

    train(checkpoint, out, data, RECIPE, progress=start_another)
    assert {text for text in said if "another run is writing" in text}
    assert all("another run is writing" in text or "not empty" in text for text in said)
    assert len(said) == 2 * 4

    first = tmp_path / "first"
    first.mkdir()  # what a run does before it reads text
    with locked(first, first), pytest.raises(MolError, match="another run is writing"):
        train(checkpoint, first, data, RECIPE)
    train(checkpoint, first, data, RECIPE)


def test_a_run_that_is_refused_leaves_no_folder(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    text = Path(corpus())
    text.write_text('{"text": 5}\n')
    with pytest.raises(MolError):
        train(tiny_mol(), tmp_path / "out", str(text), RECIPE)
    assert not (tmp_path / "out").exists()


def test_a_broken_link_in_the_way_is_refused(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(MolError, match="exists"):
        train(tiny_mol(), tmp_path / "out", corpus(), RECIPE)
    assert not (tmp_path / "gone").exists()


def test_a_folder_of_the_user_is_not_taken_for_staging(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    """Neither a folder nor a link, and before any step, not after the last."""
    checkpoint, data, out = tiny_mol(), corpus(), tmp_path / "out"
    with pytest.raises(Stopped):
        train(checkpoint, out, data, RECIPE, progress=stop_at_two)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    for put in (lambda: (out / ".final").symlink_to(mine), lambda: mine.rename(out / ".final")):
        put()
        with pytest.raises(MolError, match=r"\.final is in the way") as refused:
            train(checkpoint, out, data, RECIPE, resume=True)
        assert str(out / ".final") in refused.value.hint
        assert (out / ".final" / "thesis.txt").read_text() == "mine"
        if (out / ".final").is_symlink():
            (out / ".final").unlink()
    (out / ".final").rename(mine)
    train(checkpoint, out, data, RECIPE, resume=True)
    assert not (out / ".final").exists()


def test_a_signal_while_the_model_is_written_waits_for_it(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: None
) -> None:
    checkpoint, data = tiny_mol(), corpus()
    train(checkpoint, tmp_path / "whole", data, RECIPE)
    real = MoLForCausalLM.save_pretrained

    def interrupted(model: MoLForCausalLM, folder: Path, *others: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        real(model, folder, *others)

    monkeypatch.setattr(MoLForCausalLM, "save_pretrained", interrupted)
    train(checkpoint, tmp_path / "out", data, RECIPE)
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (tmp_path / "out" / ".final").exists()


def test_a_second_signal_leaves_no_half_written_model(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: None
) -> None:
    checkpoint, data, out = tiny_mol(), corpus(), tmp_path / "out"

    def interrupted(model: MoLForCausalLM, folder: Path) -> None:
        (folder / "half.safetensors").write_bytes(b"half")
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MoLForCausalLM, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(checkpoint, out, data, RECIPE)
    left = sorted(path.name for path in out.iterdir())
    assert left == ["checkpoints", "log.jsonl", "train.html"]
    assert train(checkpoint, out, data, RECIPE, resume=True).steps == 4


@pytest.mark.parametrize("name", ["log.jsonl", "train.html"])
def test_a_link_to_nothing_is_not_written_through(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path, name: str
) -> None:
    checkpoint, data, out = tiny_mol(), corpus(), tmp_path / "out"
    with pytest.raises(Stopped):
        train(checkpoint, out, data, RECIPE, progress=stop_at_two)
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MolError, match=f"{name} is a link to .*elsewhere, which is no file"):
        train(checkpoint, out, data, RECIPE, resume=True)
    assert not (tmp_path / "elsewhere").exists()
