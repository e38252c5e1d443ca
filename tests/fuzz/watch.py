"""In the child: note what it unpickles, and what it writes outside its folders."""

import json
import os
import sys
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events that change what their first argument names.
_CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.chmod")


class Watch:
    """An audit hook. It writes a line for each thing to a file: ["unpickled" or "outside", what].

    Args:
        root: the folder outside which nothing may change.
        note: the file.
    """

    def __init__(self, root: str, note: str) -> None:
        self.root = Path(root).resolve()
        # Opened before: a hook that opens files would call itself.
        self.note = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            self._write("unpickled", ".".join(map(str, arguments)))
        elif event == "open":
            if isinstance(arguments[0], str | bytes | os.PathLike) and arguments[2] & _WRITES:
                self._look(arguments[0])
        elif event in _CHANGES and arguments[-1] in (-1, None):
            # The last argument is an open folder, or -1; what is relative to it was opened here.
            if event != "os.symlink":
                self._look(arguments[0])
            if event in ("os.rename", "os.link", "os.symlink"):
                self._look(arguments[1])

    def _look(self, path: Any) -> None:
        entry = Path(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100 # resolve() follows links
        full = Path(os.path.realpath(entry.parent)) / entry.name
        if not full.is_relative_to(self.root) and full.parts[1] not in ("dev", "proc"):
            self._write("outside", str(full))

    def _write(self, kind: str, what: str) -> None:
        os.write(self.note, json.dumps([kind, what]).encode() + b"\n")


def install(payload: dict[str, str]) -> None:
    """Begin to watch; see `Watch`."""
    sys.addaudithook(Watch(**payload).hear)
