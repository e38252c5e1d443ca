"""Folders on disk: outputs that appear complete or not at all, and the user's cache."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molcli.errors import MolError
from molcli.files.writable import check_writable


@contextmanager
def output_folder(path: str | Path, *, need_bytes: int = 0) -> Iterator[Path]:
    """Yield a hidden temporary folder beside `path`, and rename it to `path` on success.

    After an exception the temporary folder is removed. A killed process leaves it behind; the next
    call for the same path removes it.

    Args:
        path: Must not exist, or be an empty folder.
        need_bytes: Required free space.

    Raises:
        MolError: If `path` is a file or a folder with content, another process is writing it, or
            the disk has less free space than `need_bytes`.
    """
    path = Path(path).expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = staging_folder(path)
    staging.mkdir(exist_ok=True)
    with locked(staging, path):
        try:
            refuse_existing(path)
            _remove_content(staging)
            _check_free_space(path.parent, need_bytes)
            yield staging
            _sync_tree(staging)
            staging.replace(path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _sync(path.parent)


def staging_folder(path: Path) -> Path:
    """Return the temporary folder of `output_folder`, for other processes that write into it."""
    path = path.expanduser().resolve()
    return path.with_name(f".{path.name}.partial")


def refuse_existing(path: Path) -> None:
    """Check that an output path is free.

    Raises:
        MolError: If `path` is a file or a folder with content, or its folder cannot be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise MolError(
            f"{path} exists and is not empty",
            allowed="a path that does not exist yet, or an empty folder",
            hint=f"give another path, or remove {path} first",
        )
    check_writable(path)


def cache_folder() -> Path:
    """Return `molcli` in the user's cache (XDG_CACHE_HOME, or ~/.cache); it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "molcli"


@contextmanager
def lock_for(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock for a folder, after waiting for another process to release it.

    The folder may have been created while waiting.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The kernel releases the lock when its process ends for any reason; the file may stay.
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def locked(folder: Path, path: Path) -> Iterator[None]:
    """Holds the folder's lock, which the kernel drops when its process dies in whatever way.

    folder: exists. path: what is written, for the message. Raises MolError if another process holds
    the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _try_lock(descriptor, folder):
            raise MolError(
                f"another run is writing {path}",
                allowed="one run per output path",
                hint="wait for it, or give another path",
            )
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The other run may have renamed the folder since this one opened it.
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove_content(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _check_free_space(folder: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        need_gb, free_gb = need_bytes / 1e9, free / 1e9
        raise MolError(
            f"the output needs {need_gb:.2f} GB, and {folder} has {free_gb:.2f} GB free",
            allowed="a disk with room for the whole output",
            hint="free some space, or give a path on another disk",
        )


def _sync_tree(folder: Path) -> None:
    """Flush files to disk before the rename: a power cut must not leave a folder of empty files."""
    for root, _, files in os.walk(folder):
        for file in files:
            _sync(Path(root) / file)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
