"""Processes of a benchmark, each on some of the GPUs, and what they print."""

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
_BEGUN = time.perf_counter()


def passed() -> int:
    """Seconds since the benchmark began."""
    return round(time.perf_counter() - _BEGUN)


def say(text: str) -> None:
    print(f"[{passed():4} s] {text}", file=sys.stderr, flush=True)


class Failed(Exception):
    """A process did not end well; the end of what it printed."""


@dataclass(frozen=True)
class Process:
    """limit: seconds from now on, after which it is ended."""

    name: str
    popen: subprocess.Popen[bytes]
    printed: Path
    limit: float

    def finish(self) -> str:
        """Waits for its end. Returns what it printed. Raises Failed."""
        late = time.perf_counter() + self.limit
        while (status := self._wait(min(15, self.limit))) is None and time.perf_counter() < late:
            say(f"{self.name} is running")
        self.stop()
        how = f"took over {self.limit:g} s" if status is None else f"ended with status {status}"
        say(f"{self.name} {how}")
        text = self.printed.read_text(encoding="utf-8", errors="replace")
        if status != 0:
            raise Failed(f"{self.name} {how}\n{text[-_TAIL:]}")
        return text

    def stop(self) -> None:
        """Ends it, if it still runs: by a signal that torchrun's agent passes on."""
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
    """Of this Python. What still runs at the end is ended.

    folder: of files with what they print. limit: seconds for each.
    """

    folder: Path
    limit: float
    started: list[Process] = field(default_factory=list)

    def start(self, name: str, gpus: str, command: Sequence[object]) -> Process:
        """On these GPUs."""
        here = {
            "CUDA_VISIBLE_DEVICES": gpus,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "MOLCLI_DEBUG": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",  # a process that hangs does not hear signals
        }
        printed = self.folder / f"{name}.txt"
        with printed.open("wb") as file:
            popen = subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=os.environ | here,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        say(f"{name} begins on GPU {gpus}")
        self.started.append(Process(name, popen, printed, self.limit))
        return self.started[-1]

    def __exit__(self, *error: object) -> None:
        for process in self.started:
            process.stop()


def attempt(part: Callable[..., object], *given: object) -> bool:
    """Whether it came to its end; what it failed on is told."""
    try:
        part(*given)
    except Exception as error:  # the other parts go on
        say(f"{part.__name__} failed: {type(error).__name__}: {error}")
        return False
    return True
