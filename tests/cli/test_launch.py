"""Several processes: how they start, how they end, and that one of them speaks."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from molcli.cli import distributed as ranks
from molcli.cli import train as command
from molcli.cli.distributed import check_gpus, check_run, launch
from molcli.cli.failures import explain
from molcli.config.sections import TrainConfig
from molcli.errors import MolError


@pytest.fixture
def torchruns_store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """As a process of two sees it."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


@pytest.mark.parametrize(
    "code, status",
    [
        ("import os, sys; sys.exit(2 if os.environ['RANK'] == '1' else 0)", 2),
        ("import os; assert os.environ['WORLD_SIZE'] == '2'", 0),
        ("import os; os.kill(os.getpid(), 9)", 1),
    ],
)
def test_the_exit_status_is_that_of_the_process_that_failed(code: str, status: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert launch(2, ["-c", code]) == status
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("torchruns_store")
def test_an_error_that_all_meet_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    error = MolError("the disk is full", hint="another disk")
    with ThreadPoolExecutor(2) as processes:
        statuses = list(processes.map(explain, [error, error]))
    assert statuses == [2, 2]
    assert capfd.readouterr().err.count("the disk is full") == 1


@pytest.mark.usefixtures("torchruns_store")
def test_a_process_ends_when_another_has_told_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(ranks.os, "_exit", ended.append)
    monkeypatch.setattr(ranks.time, "sleep", lambda seconds: None)
    watching = ranks.follow_errors()
    explain(MolError("the disk is full"))
    watching.join(timeout=60)
    assert ended == [1]


def test_a_process_alone_needs_no_store(capfd: pytest.CaptureFixture[str]) -> None:
    assert explain(MolError("the disk is full")) == 2
    assert "the disk is full" in capfd.readouterr().err


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_gpus(2)
    with pytest.raises(MolError, match="--gpus is 4, and this machine shows 2 GPUs"):
        check_gpus(4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(MolError, match="shows no GPU") as error:
        check_gpus(2)
    assert error.value.hint.startswith("torchrun --nproc-per-node=N")


@pytest.mark.usefixtures("torchruns_store")
def test_gpus_beside_torchrun_must_agree_with_it() -> None:
    assert command._processes(None) == command._processes(2) == 2
    with pytest.raises(MolError, match="--gpus is 3, and torchrun started 2 processes"):
        command._processes(3)


def test_what_all_processes_would_refuse_is_refused_before_they_start(
    tmp_path: Path,
) -> None:
    with pytest.raises(MolError, match="holds no checkpoint"):
        check_run(tmp_path, tmp_path / "out", TrainConfig(), 2, parent=False, resume=False)
