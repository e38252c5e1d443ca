"""Write a file so that it is complete or as it was before, also after a kill or on a full disk."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path


def partial_of(path: Path) -> Path:
    """Return the hidden file that becomes this file."""
    return path.with_name(f".{path.name}.molcli-partial")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file by one with this content; text is written as UTF-8.

    It is first written to a hidden file beside it. What a killed process left there is
    replaced. A pipe or a device is written directly.

    Raises:
        OSError: The folder does not exist, cannot be written, or is full. The file is as before.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path = path.resolve()  # a link stays, and its target is replaced
    partial = partial_of(path)
    descriptor = _create(partial)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(descriptor)
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # for the message: a full disk has no name
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _create(path: Path) -> int:
    """Create a file, never follow a link, and lock it. Returns its descriptor.

    A file that is there is removed, after its process has ended or finished it.
    """
    while True:
        with suppress(FileExistsError):
            created = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            if _locked(created, path):
                return created
            os.close(created)
            continue
        with suppress(FileNotFoundError):
            old = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if _locked(old, path):
                    path.unlink()
            finally:
                os.close(old)


def _locked(descriptor: int, path: Path) -> bool:
    """Wait for the file's lock; False if the path is another file by then."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
