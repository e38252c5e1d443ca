"""Run `molcli` commands in forks of a process that has imported everything: 0.1 s each, not 6 s.

A fork of the pytest process would not do: its threads' locks would be copied as they are. So
`Forked` starts a process of its own, which imports, computes nothing, has one thread, and forks a
child for each run. The child's exit status, output and working folder are those of the real
command; only the imports happened before.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]
_TICK = 0.01  # seconds between two looks at a child
_WALL_PER_CPU = 10  # a limit in seconds of CPU is this many on the clock, for what only waits
# Before the imports: one thread, no network.
_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    **dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "MOLCLI_VERSIONS_CHECKED": "1",
}
# What commands import when they run.
_WARM = (
    *("torch", "transformers", "safetensors.torch", "tokenizers", "datasets", "gguf", "yaml"),
    *("rich.console", "rich.progress", "rich.table"),
    *("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
)


@dataclass(frozen=True)
class Run:
    """A command to run.

    Attributes:
        argv: words after `molcli`.
        cwd: working folder.
        env: is all of the environment, besides `PATH` and variables that keep torch at one
            thread; `HOME`, `TMPDIR` and `XDG_CACHE_HOME` should be in it. What libraries read at
            import, such as `HF_HOME`, was read before.
        stdin: what the command can read.
        seconds: CPU time after which it is killed; ten times as much on the clock.
        memory: resident bytes, of the imports too (about 0.6 GB), above which it is killed.
        setup: "module:function", called in the child before the command with `payload`.
        payload: JSON-serialisable.
        signal_after: (seconds, signal) to send from outside, if it still runs then.
    """

    argv: Sequence[str]
    cwd: str
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: str = ""
    seconds: float = 60
    memory: int = 4 * 2**30
    setup: str | None = None
    payload: Any = None
    signal_after: tuple[float, int] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: exit status as a shell gives it: 128 + signal for a process that a signal ended.
        signal: that signal, or None.
        stdout: what it printed.
        stderr: the same.
        seconds: on the clock.
        cpu: seconds of CPU.
        peak: largest resident size in bytes, of the imports too.
        over: the limit that ended it: "seconds", "memory", or None.
    """

    code: int
    signal: int | None
    stdout: str
    stderr: str
    seconds: float
    cpu: float
    peak: int
    over: str | None


class Forked:
    """The warmed process; a context manager. Runs one command at a time; start more for more."""

    def __init__(self) -> None:
        paths = [path for path in sys.path if path]
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, self._folder.name],
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, argv: Sequence[object], cwd: str | Path, **fields: Any) -> Outcome:
        """Run a command; the keywords are fields of `Run`."""
        run = Run([str(word) for word in argv], str(cwd), **fields)
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(asdict(run)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the warmed process ended: {self._process.wait()}")
        return Outcome(**json.loads(answer))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()


# --- in the warmed process ---


def _serve() -> Run:
    """Answer runs until there are no more, and exit. Returns in each child: the run to do."""
    # Nothing but answers may go to this pipe, so children and libraries get another stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _warm()
    folder = Path(sys.argv[1])
    for line in iter(sys.stdin.readline, ""):
        run = Run(**json.loads(line))
        for name in ("stdin", "stdout", "stderr"):
            content = run.stdin if name == "stdin" else ""
            (folder / name).write_text(content, encoding="utf-8", errors="surrogateescape")
        ending, end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ending)
            answers.close()
            _become(run, folder)
            return run
        os.close(end)  # the child's end closes when it ends
        outcome = _watch(run, child, ending)
        os.close(ending)
        printed = {
            name: (folder / name).read_text(encoding="utf-8", errors="replace")
            for name in ("stdout", "stderr")
        }
        answers.write(json.dumps(outcome | printed) + "\n")
        answers.flush()
    os._exit(0)


def _warm() -> None:
    sys.path.append(str(ROOT))
    import torch

    if not torch.cuda.is_available():  # before anything imports Triton
        os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)
    import molcli

    root = Path(molcli.__file__).parent
    ours = sorted(
        ".".join(path.relative_to(root.parent).with_suffix("").parts)
        for path in root.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    )
    for name in (*_WARM, *ours):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    # That of pyarrow's allocator expects to be forked.
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    started = [name for name in threads[1:] if not name.startswith("jemalloc")]
    if started:
        raise RuntimeError(f"imports started threads ({started}): a fork of them may never wake")


def _become(run: Run, folder: Path) -> None:
    """Turn the child into the command's process."""
    os.setsid()  # what it starts can be killed with it
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        opened = os.open(folder / name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(run.cwd)
    names = {*_ENVIRONMENT, "TRITON_INTERPRET", "PATH"} & os.environ.keys()
    kept = {name: os.environ[name] for name in names}
    os.environ.clear()
    os.environ.update(kept | dict(run.env))
    tempfile.tempdir = None
    random.seed()
    import numpy

    numpy.random.seed()
    sys.argv = ["molcli", *run.argv]


def _watch(run: Run, child: int, ending: int) -> dict[str, Any]:
    """Wait for the child; kill it beyond a limit."""
    start, over, peak = time.perf_counter(), None, 0
    left = run.signal_after
    while True:
        elapsed = time.perf_counter() - start
        tick = min(_TICK, max(left[0] - elapsed, 0)) if left else _TICK
        select.select([ending], [], [], tick)
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        elapsed = time.perf_counter() - start
        if left and elapsed >= left[0]:
            os.kill(child, left[1])
            left = None
        memory, cpu = _usage(child)
        peak = max(peak, memory)
        if over is None:
            if memory > run.memory:
                over = "memory"
            elif cpu > run.seconds or elapsed > _WALL_PER_CPU * run.seconds:
                over = "seconds"
            if over:
                os.kill(child, signal.SIGKILL)
    seconds = time.perf_counter() - start
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "code": 128 + number if number else os.WEXITSTATUS(status),
        "signal": number,
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": max(peak, usage.ru_maxrss * scale),
        "over": over,
    }


def _usage(process: int) -> tuple[int, float]:
    """Resident bytes and seconds of CPU; zeros where there is no /proc, or the process ended."""
    try:
        memory = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return 0, 0.0
    ticks = int(words[11]) + int(words[12])
    return memory * resource.getpagesize(), ticks / os.sysconf("SC_CLK_TCK")


def _command(run: Run) -> int:
    """Run the command in the child, and return its exit status."""
    if run.setup:
        module, _, function = run.setup.partition(":")
        getattr(importlib.import_module(module), function)(run.payload)
    from molcli.cli.main import main

    try:
        main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(status: int) -> None:
    """End as the interpreter does, without freeing a million objects one by one: a second less."""
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


if __name__ == "__main__":
    _end(_command(_serve()))
