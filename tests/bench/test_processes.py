"""A process that fails or hangs does not stop the rest of a benchmark."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from processes import Failed, Processes, attempt


def test_output_of_a_process_is_returned(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], file=sys.stderr)"
    with Processes(tmp_path, 60) as processes:
        assert processes.start("it", "0,1", ["-c", code]).finish() == "0,1\n"


def test_a_failure_raises_with_the_end_of_the_output(tmp_path: Path) -> None:
    processes = Processes(tmp_path, 60)
    with processes, pytest.raises(Failed, match=r"it ended with status 3\n(?s:.*)said$"):
        processes.start("it", "", ["-c", "print('said', end=''); exit(3)"]).finish()


def test_processes_that_take_too_long_are_stopped(tmp_path: Path) -> None:
    with Processes(tmp_path, 0.1) as processes:
        hanging = processes.start("it", "", ["-c", "import signal; signal.pause()"])
        with pytest.raises(Failed, match=r"it took over 0.1 s"):
            hanging.finish()
        left = processes.start("other", "", ["-c", "import signal; signal.pause()"])
    assert hanging.popen.poll() is not None and left.popen.poll() is not None


def test_a_part_that_fails_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    def part(number: int) -> None:
        raise Failed(f"number {number}")

    assert not attempt(part, 7)
    assert "part failed: Failed: number 7" in capsys.readouterr().err
    assert attempt(print)
