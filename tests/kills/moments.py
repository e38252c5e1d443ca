"""In the child: count what the command does to files, and end it at one of these moments.

Between two of them the disk does not change, so a kill at any time is a kill at one of them: before
it, in the middle (a file that is open and half written), or right after it. They come from Python's
audit events, and for writers in C++ and Rust from their calls in Python.
"""

import atexit
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_HALF = b'{"half of what was to be wri'
# Python's audit events on paths, and what they do.
_DO: dict[str, Callable[..., Any]] = {
    "os.mkdir": os.mkdir,
    "os.rename": os.replace,
    "os.remove": os.unlink,
    "os.rmdir": os.rmdir,
    "os.link": os.link,
    "os.symlink": os.symlink,
    "os.chmod": os.chmod,
}


class Moments:
    """Counts moments below `root`, two for each change of the disk: before and after it.

    Args:
        root: the folder that matters.
        at: the moment to end at; None for never.
        number: the signal to end with.
        then: after another signal than SIGKILL, SIGKILL ends it this many moments later.
        note: a folder, for the files `moment`, what it was, and `count`, how many there were.
    """

    def __init__(self, root: str, at: int | None, number: int, then: int | None, note: str) -> None:
        self.root, self.note = Path(root).resolve(), Path(note)
        self.at, self.number, self.then = at, number, then
        self.count = 0
        self._busy = False
        atexit.register(lambda: self._write("count", str(self.count)))

    def pass_by(self, what: str, do: Callable[[], Any]) -> None:
        """Count a change, and end here if it is time. do: makes the change, or half of it."""
        at, self.count = self.count, self.count + 2
        if self.at is None or self.at // 2 != at // 2:
            return
        number, after = self.number, self.at % 2 == 1 and self.number == signal.SIGKILL
        self._write("moment", f"{'after' if after else 'before'} {what}")
        if after:
            do()
        self.at = None if self.then is None else self.at + self.then
        self.number, self.then = signal.SIGKILL, None
        # Other signals are handled as Python does: the change fails with the handler's exception.
        signal.raise_signal(number)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python's audit hook."""
        if self._busy or not (event == "open" or event in _DO):
            return
        self._busy = True
        try:
            self._hear(event, arguments)
        finally:
            self._busy = False

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0]
        if isinstance(path, int) or (event == "open" and not arguments[2] & _WRITES):
            return
        folder = None if event == "open" else _open_folder(arguments)
        if folder is None:
            shown = self.below(path)
        else:
            shown = self.below(_opened(folder) / os.fsdecode(path))
        if shown is None:
            return
        if event == "open":
            self.pass_by(f"writing {shown}", lambda: _write_half(path, arguments[2]))
            return
        words = [f"{event.removeprefix('os.')} {shown}"]
        if event in ("os.rename", "os.link", "os.symlink"):
            words.append(f"to {self.below(arguments[1])}")
        self.pass_by(" ".join(words), lambda: _do(event, arguments))

    def writer(self, real: Callable[..., Any], place: int) -> Callable[..., Any]:
        """Wrap a function that writes the file of its argument number `place`."""

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            path = arguments[place] if place < len(arguments) else None
            shown = self.below(path) if isinstance(path, str | os.PathLike) else None

            def half() -> None:
                real(*arguments, **keywords)
                os.truncate(path, Path(path).stat().st_size // 2)

            if shown is not None:
                self.pass_by(f"writing {shown}", half)
            return real(*arguments, **keywords)

        return wrapped

    def below(self, path: Any) -> str | None:
        """The path relative to the root, or None."""
        entry = Path(os.fsdecode(path))
        full = entry.parent.resolve() / entry.name
        return str(full.relative_to(self.root)) if full.is_relative_to(self.root) else None

    def _write(self, name: str, text: str) -> None:
        busy, self._busy = self._busy, True
        (self.note / name).write_text(text, encoding="utf-8")
        self._busy = busy


def _write_half(path: Any, flags: int) -> None:
    descriptor = os.open(path, flags & ~os.O_DIRECTORY, 0o666)
    if flags & (os.O_WRONLY | os.O_RDWR):
        os.write(descriptor, _HALF)


def _do(event: str, arguments: tuple[Any, ...]) -> None:
    """Make a change that an audit event announces."""
    if event in ("os.remove", "os.rmdir"):
        _DO[event](arguments[0], dir_fd=_open_folder(arguments))
    else:  # (from, to, ...) or (path, mode, ...)
        _DO[event](arguments[0], arguments[1])


def _open_folder(arguments: tuple[Any, ...]) -> int | None:
    """The descriptor of the folder that the path is relative to: the last argument, or -1."""
    last = arguments[-1]
    return last if isinstance(last, int) and last > 2 else None


def _opened(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def make_small() -> None:
    """Let tiny work save its state at once, and fill several files."""
    from molcli.data.token_folder import write_token_folder
    from molcli.files import resumable
    from molcli.stages.cache_logits import cache_logits
    from molcli.stages.upcycle import run as upcycle

    resumable.MIN_SAVE_INTERVAL = resumable.MIN_WORK_PER_SAVE = 0
    upcycle.SHARD_BYTES, upcycle.SHARDS = 2**16, 2**20
    write_token_folder.__kwdefaults__["shard_tokens"] = 300
    cache_logits.__wrapped__.__kwdefaults__["shard_bytes"] = 2**13


def arm(payload: dict[str, Any]) -> None:
    """Set the moment; see `Moments`."""
    import safetensors.torch
    import torch

    make_small()
    moments = Moments(**payload)
    safetensors.torch.serialize_file = moments.writer(safetensors.torch.serialize_file, 1)
    torch.save = moments.writer(torch.save, 1)
    sync = os.fsync

    def synced(descriptor: int) -> None:
        shown = moments.below(_opened(descriptor))
        if shown is not None:
            moments.pass_by(f"fsync {shown}", lambda: None)
        sync(descriptor)

    os.fsync = synced
    sys.addaudithook(moments.hear)
