"""Output files that appear complete or not at all, written by one process at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from molcli.errors import MolError
from molcli.files.folders import remove_leftovers
from molcli.files.hidden_folders import PARTIAL, hidden_folder


@contextmanager
def output_file(path: Path) -> Iterator[TextIO]:
    """Yield a file in a hidden folder beside `path`, and rename it to `path` on success.

    After an exception the hidden folder is removed. A killed process leaves it behind; the next
    call for the same path removes it.

    Args:
        path: Must not exist.

    Raises:
        MolError: If `path` exists, another process is writing it, or the hidden folder's name is in
            use.
    """
    _refuse_existing(path)
    with hidden_folder(path, PARTIAL) as folder:
        _refuse_existing(path)
        partial = folder / "output"
        try:
            with partial.open("w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.filename is None:
                error.filename = str(path)  # for the message: a full disk has no name
            raise
        _refuse_existing(path)
        partial.replace(path)


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        remove_leftovers(path)
        raise MolError(f"{path} exists", hint="another path, or remove it first")
