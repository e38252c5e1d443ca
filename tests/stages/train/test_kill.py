"""Kills and signals at chosen calls, not at chosen times."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from molcli.config.recipe import save_recipe
from molcli.config.sections import Recipe, TrainConfig
from molcli.errors import Interrupted, MolError
from molcli.model import MoLForCausalLM
from molcli.stages.train import checkpoints, train

# A process of its own forks a child for every kill: the imports are paid for once. It computes
# nothing before the last kill, and so has no threads, whose locks a fork would copy as they are.
DRIVER = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from molcli.config.recipe import load_recipe
from molcli.stages.train import checkpoints
from molcli.stages.train import train
from molcli.stages.train.objective import PredictionObjective

torch.set_num_threads(1)
checkpoint, out, data, recipe = sys.argv[1:]

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def at_call(owner, name, number, half_done=lambda *arguments: None):
    real, calls = getattr(owner, name), []
    def counted(*arguments, **keywords):
        calls.append(0)
        if len(calls) == number:
            half_done(*arguments)
            kill()
        return real(*arguments, **keywords)
    setattr(owner, name, counted)

def half_a_file(tensors, path):
    path.write_bytes(b"half of the tensors")

def half_a_folder(folder):
    next(Path(folder).iterdir()).unlink()

moments = [
    lambda: at_call(PredictionObjective, "backward", 2),
    lambda: at_call(torch, "save", 1, half_a_file),
    lambda: at_call(torch.optim.AdamW, "step", 4),
    lambda: at_call(shutil, "rmtree", 1, half_a_folder),
    lambda: at_call(sys.modules["molcli.stages.train.loop"], "save_model", 1),
]
for number, arm in enumerate(moments):
    threads = Path("/proc/self/task")
    assert not threads.is_dir() or len(list(threads.iterdir())) == 1, "a fork may never wake"
    child = os.fork()
    if child == 0:
        arm()
        train(Path(checkpoint), Path(out), data, load_recipe(recipe), resume=number > 0)
        os._exit(1)  # the kill was missed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (number, status)
train(Path(checkpoint), Path(out), data, load_recipe(recipe), resume=True)
"""

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_structures": ["dense", "mixture"],
    "layer_mixers": ["attention", "attention"],
}


def recipe(**settings: Any) -> Recipe:
    """Ten steps of two rows of 16, a checkpoint after every second."""
    tiny: dict[str, Any] = {
        "tokens": 10 * 2 * 16,
        "context_length": 16,
        "batch_size": 2,
        "micro_batch_size": 1,
        "checkpoint_every": 2,
        "log_every": 1,
        "precision": "fp32",
    }
    return Recipe(train=TrainConfig(**(tiny | settings)))


def equal(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_run_killed_again_and_again_ends_as_an_unkilled_one(
    tiny_mol: Callable[..., Path], corpus: Callable[..., str], tmp_path: Path
) -> None:
    checkpoint, data = tiny_mol(**SMALL), corpus()
    train(checkpoint, tmp_path / "whole", data, recipe())
    save_recipe(recipe(), tmp_path / "recipe.yaml")
    arguments = [checkpoint, tmp_path / "killed", data, tmp_path / "recipe.yaml"]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert equal(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """SIGINT as in a terminal: a script's background processes are started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves_it(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    checkpoint, data, out = tiny_mol(**SMALL), corpus(), tmp_path / "stopped"
    train(checkpoint, tmp_path / "whole", data, recipe(checkpoint_every=0))

    def raise_in_step_three(done: int, total: int | None, note: str = "") -> None:
        if note and done == 3 * 2 * 16:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped:
        train(checkpoint, out, data, recipe(checkpoint_every=0), progress=raise_in_step_three)
    assert stopped.value.signal == number
    assert "step 3 of 10 of stage 0 pretrain" in stopped.value.saved
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == ["step-00000003"]
    assert signal.getsignal(number) == before
    train(checkpoint, out, data, recipe(checkpoint_every=0), resume=True)
    assert equal(tmp_path / "whole", out)


def test_a_second_signal_does_not_wait(
    tiny_mol: Callable[..., Path], corpus: Callable[..., str], tmp_path: Path
) -> None:
    def raise_twice(done: int, total: int | None, note: str = "") -> None:
        if note:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_mol(**SMALL), tmp_path / "out", corpus(), recipe(), progress=raise_twice)


def test_an_ignored_signal_stays_ignored(
    tiny_mol: Callable[..., Path], corpus: Callable[..., str], tmp_path: Path
) -> None:
    def interrupt(done: int, total: int | None, note: str = "") -> None:
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    result = train(tiny_mol(**SMALL), tmp_path / "out", corpus(), recipe(), progress=interrupt)
    assert result.steps == 10


def test_a_full_disk_leaves_earlier_checkpoints(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, data, out = tiny_mol(**SMALL), corpus(), tmp_path / "out"
    train(checkpoint, tmp_path / "whole", data, recipe())
    real, calls = torch.save, []

    def full_at_the_third(tensors: object, path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints.torch, "save", full_at_the_third)
    with pytest.raises(MolError, match=r"step-00000006 could not be written.*No space") as stopped:
        train(checkpoint, out, data, recipe())
    assert "step-00000004" in stopped.value.hint
    kept = sorted(folder.name for folder in (out / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]
    train(checkpoint, out, data, recipe(), resume=True)
    assert equal(tmp_path / "whole", out)


def test_a_disk_full_at_the_end_loses_only_the_steps_since_the_last_checkpoint(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, data, out = tiny_mol(**SMALL), corpus(), tmp_path / "out"

    def full(model: object, folder: Path) -> None:
        (folder / "half.safetensors").write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MoLForCausalLM, "save_pretrained", full)
        with pytest.raises(MolError, match=r"could not be written to .*out: .*No space"):
            train(checkpoint, out, data, recipe())
    left = sorted(path.name for path in out.iterdir())
    assert left == ["checkpoints", "log.jsonl", "train.html"]
    assert train(checkpoint, out, data, recipe(), resume=True).steps == 10
    assert (out / "config.json").is_file()


def test_a_damaged_checkpoint_is_named_with_the_way_out(
    tiny_mol: Callable[..., Path], corpus: Callable[..., str], tmp_path: Path
) -> None:
    checkpoint, data, out = tiny_mol(**SMALL), corpus(), tmp_path / "out"
    train(checkpoint, tmp_path / "whole", data, recipe())

    def stop(done: int, total: int | None, note: str = "") -> None:
        if note and done == 5 * 2 * 16:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(checkpoint, out, data, recipe(), progress=stop)
    newest = out / "checkpoints" / "step-00000004"
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:1000])
    with pytest.raises(MolError, match="step-00000004 cannot be read") as damaged:
        train(checkpoint, out, data, recipe(), resume=True)
    assert f"remove {newest}" in damaged.value.hint
    for file in newest.iterdir():
        file.unlink()
    with pytest.raises(MolError, match="step-00000004 cannot be read"):
        train(checkpoint, out, data, recipe(), resume=True)
    newest.rmdir()
    train(checkpoint, out, data, recipe(), resume=True)
    assert equal(tmp_path / "whole", out)
