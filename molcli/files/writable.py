"""Outputs that cannot be written: noticed before the work, and named in errors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molcli.errors import MolError
from molcli.files.paths import expanded


def check_writable(path: Path) -> None:
    """Check that a file or folder can be created at a path, or replaced there.

    Folders on the way that do not exist would be created.

    Raises:
        MolError: A part of the way is a file, or the last folder that exists cannot be written.
    """
    folder = expanded(path).resolve().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise MolError(
            f"{path} cannot be written: {folder} is a file",
            allowed="a path in a folder",
            hint="give another path",
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MolError(
            f"{path} cannot be written: you may not write in {folder}",
            allowed="a folder of your own, on a disk that is not read-only",
            hint=f"give another path, such as ~/{path.name}",
        )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an OSError: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
