"""Output files that appear complete or not at all, written by one process at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from molcli.errors import MolError
from molcli.files.hidden_folders import locked


@contextmanager
def output_file(path: Path, *, begins: str) -> Iterator[TextIO]:
    """Yield a hidden file beside `path`, and rename it to `path` on success.

    After an exception the hidden file is removed. A killed process leaves it behind; the next call
    for the same path writes it anew.

    Args:
        path: Must not exist.
        begins: The first characters of every such file, which show that a hidden file is one that
            a killed process left, and no file of the user's.

    Raises:
        MolError: If `path` exists, another process is writing it, or the hidden file's name is in
            use.
    """
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.partial")
    if hidden.is_symlink() or (hidden.exists() and not hidden.is_file()):
        raise _not_ours(hidden)
    os.close(_open(hidden, os.O_CREAT | os.O_RDWR))
    with locked(hidden, path), os.fdopen(_open(hidden, os.O_RDWR), "r+", encoding="utf-8") as file:
        found = os.read(file.fileno(), len(begins.encode()))
        # A second name of the file would be a file that we empty.
        if not begins.encode().startswith(found) or os.fstat(file.fileno()).st_nlink > 1:
            raise _not_ours(hidden)
        try:
            _refuse_existing(path)
            file.seek(0)
            file.truncate()
            yield file
            file.flush()
            os.fsync(file.fileno())
            _refuse_existing(path)
            hidden.replace(path)
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(path)  # for the message: a full disk has no name
            hidden.unlink(missing_ok=True)
            raise


def _open(path: Path, flags: int) -> int:
    # Not through a link, should one have come since this was checked.
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise MolError(f"{path} exists", hint="another path, or remove it first")


def _not_ours(hidden: Path) -> MolError:
    return MolError(
        f"{hidden} exists, and it is not what an earlier run left",
        allowed="a path beside which this name is free",
        hint=f"another path, or move {hidden} first",
    )
