"""Checkpoints that are written in the background, by a group of one process."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.checkpoint import FileSystemWriter

from molcli.config.sections import TrainConfig
from molcli.errors import MolError
from molcli.model.checkpoint import open_checkpoint
from molcli.stages.train.checkpoint_folder import newest_checkpoint
from molcli.stages.train.checkpoint_reader import load_checkpoint
from molcli.stages.train.checkpoints import BackgroundSaver
from molcli.stages.train.optimizer import make_optimizer
from molcli.stages.train.state import TrainState


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[BackgroundSaver]:
    yield open_saver(tmp_path)
    torch.distributed.destroy_process_group()


def open_saver(folder: Path) -> BackgroundSaver:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group-{os.getpid()}", world_size=1, rank=0
    )
    return BackgroundSaver(Accelerator(cpu=True), folder / "checkpoints")


def new_state(checkpoint: Path) -> TrainState:
    model = open_checkpoint(checkpoint, torch.device("cpu"))
    return TrainState(model, make_optimizer(model, TrainConfig()))


@pytest.fixture
def state(tiny_mol: Callable[..., Path]) -> TrainState:
    return new_state(tiny_mol())


def advance(state: TrainState, value: float) -> None:
    """A step with every gradient of this value."""
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    state.optimizer.step()
    state.step += 1


def everything(state: TrainState) -> list[torch.Tensor]:
    moments = state.optimizer.state_dict()["state"].values()
    return [x.clone() for x in state.model.state_dict().values()] + [
        x.clone() for kept in moments for x in kept.values()
    ]


def test_a_checkpoint_is_the_state_at_the_time_of_the_call(
    state: TrainState, saver: BackgroundSaver, tmp_path: Path
) -> None:
    """Steps continue while it is written. All of it is read back, and the counters too."""
    advance(state, 0.5)
    wanted = everything(state)
    torch.manual_seed(7)
    saver.save(state, {"who": "me"})
    drawn = torch.rand(3)
    advance(state, -0.25)
    saver.finish()
    saved = newest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None and saved.identity == {"who": "me"}
    # A fresh optimiser, as in a resumed run.
    state.optimizer = make_optimizer(state.model, TrainConfig())
    load_checkpoint(state, saved)
    assert state.step == 1
    assert all(map(torch.equal, everything(state), wanted))
    assert torch.equal(torch.rand(3), drawn)


def test_a_state_without_a_step_is_saved_and_read(
    state: TrainState, saver: BackgroundSaver, tmp_path: Path
) -> None:
    """The optimiser begins with moments of 0."""
    saver.save(state, {})
    saver.finish()
    advance(state, 0.5)
    wanted = everything(state)
    saved = newest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None
    state.optimizer = make_optimizer(state.model, TrainConfig())
    load_checkpoint(state, saved)
    advance(state, 0.5)
    assert all(map(torch.equal, everything(state), wanted))


def test_a_full_disk_is_reported_and_earlier_checkpoints_stay(
    state: TrainState, saver: BackgroundSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance(state, 0.5)
    saver.save(state, {})
    saver.finish()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    advance(state, 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", full)
        saver.save(state, {})
        with pytest.raises(MolError, match=r"step-00000002 could not.*No space") as error:
            saver.finish()
    assert "step-00000001" in error.value.hint
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    advance(state, 0.5)
    saver.save(state, {})
    saver.finish()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000001", "step-00000003"]


def save_and_be_killed(checkpoint: Path, folder: Path) -> None:
    """Save one step, and be killed while writing the next; runs in a process of its own."""
    state, saver = new_state(checkpoint), open_saver(folder)
    advance(state, 0.5)
    saver.save(state, {})
    saver.finish()

    def half_then_killed(writer: FileSystemWriter, *arguments: Any) -> None:
        (Path(writer.path) / "__0_0.distcp").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    FileSystemWriter.write_data = half_then_killed
    advance(state, 0.5)
    saver.save(state, {})
    saver.finish()


def test_a_kill_while_writing_leaves_earlier_checkpoints(
    tiny_mol: Callable[..., Path], tmp_path: Path
) -> None:
    # Not a fork: this process has threads, whose locks a fork would copy as they are.
    code = (
        "import runpy, sys; from pathlib import Path; "
        "module, *paths = sys.argv[1:]; "
        "runpy.run_path(module)['save_and_be_killed'](*map(Path, paths))"
    )
    checkpoint = tiny_mol()
    command = [sys.executable, "-c", code, __file__, str(checkpoint), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = new_state(checkpoint)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [".step-00000002.partial", "step-00000001"]
    advance(state, 0.5)
    wanted = everything(state)
    saved = newest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None
    load_checkpoint(state, saved)
    assert state.step == 1
    assert all(map(torch.equal, everything(state), wanted))


def test_a_damaged_checkpoint_is_named(
    state: TrainState, saver: BackgroundSaver, tmp_path: Path
) -> None:
    saver.save(state, {})
    saver.finish()
    saved = newest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None
    part = saved.folder / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(MolError, match="step-00000000 cannot be read"):
        load_checkpoint(state, saved)
    (saved.folder / ".metadata").unlink()
    with pytest.raises(MolError, match="step-00000000 cannot be read"):
        load_checkpoint(state, saved)
