"""Check before the work that its output can be written."""

import os
from pathlib import Path

from molcli.errors import MolError


def check_writable(path: Path) -> None:
    """Check that a file or folder can be created at a path, or replaced there.

    Folders on the way that do not exist would be created.

    Raises:
        MolError: A part of the way is a file, or the last folder that exists cannot be written.
    """
    folder = path.expanduser().resolve().parent
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
