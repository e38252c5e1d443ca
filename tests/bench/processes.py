"""Run the processes of a benchmark on selected GPUs, and collect their output."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
_TAIL = 9000  # characters: tracebacks of two processes, and what torchrun adds
_START = time.perf_counter()


def elapsed() -> int:
    """Return the seconds since the benchmark started."""
    return round(time.perf_counter() - _START)


def say(text: str) -> None:
    """Print a message with the elapsed time on stderr."""
    print(f"[{elapsed():4} s] {text}", file=sys.stderr, flush=True)


class Failed(Exception):
    """A process failed or timed out. The message has the end of its output."""


@dataclass(frozen=True)
class Process:
    """A running process.

    Attributes:
        name: for messages.
        popen: the process.
        printed: file with its output.
        limit: seconds after which `finish` stops it.
    """

    name: str
    popen: subprocess.Popen[bytes]
    printed: Path
    limit: float

    def finish(self) -> str:
        """Wait for the process and return its output. Raises Failed."""
        deadline = time.perf_counter() + self.limit
        while (
            status := self._wait(min(15, self.limit))
        ) is None and time.perf_counter() < deadline:
            say(f"{self.name} is running")
        self.stop()
        how = f"took over {self.limit:g} s" if status is None else f"ended with status {status}"
        say(f"{self.name} {how}")
        text = self.printed.read_text(encoding="utf-8", errors="replace")
        if status != 0:
            raise Failed(f"{self.name} {how}\n{text[-_TAIL:]}")
        return text

    def stop(self) -> None:
        """Stop the process if it still runs, by a signal that torchrun's agent forwards."""
        if self.popen.poll() is None:
            self.popen.terminate()
            if self._wait(45) is None:
                self.popen.kill()

    def _wait(self, seconds: float) -> int | None:
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


@dataclass
class Processes(AbstractContextManager["Processes"]):
    """Processes of this Python interpreter; those that still run at the end are stopped.

    Attributes:
        folder: for files with their output.
        limit: seconds for each process.
        started: all processes so far.
    """

    folder: Path
    limit: float
    started: list[Process] = field(default_factory=list)

    def start(self, name: str, gpus: str, command: Sequence[object]) -> Process:
        """Start a process that sees only these GPUs, such as "0,1"."""
        variables = {
            "CUDA_VISIBLE_DEVICES": gpus,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "MOLCLI_DEBUG": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",  # a process that hangs ignores signals
        }
        printed = self.folder / f"{name}.txt"
        with printed.open("wb") as file:
            popen = subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=os.environ | variables,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        say(f"{name} begins on GPU {gpus}")
        self.started.append(Process(name, popen, printed, self.limit))
        return self.started[-1]

    def __exit__(self, *error: object) -> None:
        for process in self.started:
            process.stop()


def attempt(part: Callable[..., object], *arguments: object) -> bool:
    """Run a part of a benchmark. Return whether it succeeded; print the error if it failed."""
    try:
        part(*arguments)
    except Exception as error:  # the other parts still run
        say(f"{part.__name__} failed: {type(error).__name__}: {error}")
        return False
    return True
