"""Folders on disk: outputs that appear complete or not at all, and the user's cache."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molcli.errors import MolError
from molcli.files.hidden_folders import (
    PARTIAL,
    SCRATCH,
    hidden_folder,
    hidden_path,
    remove_leftover,
)
from molcli.files.paths import expanded
from molcli.files.writable import check_writable


@contextmanager
def output_folder(path: str | Path, *, need_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary folder in a hidden one beside `path`, and rename it to `path` on success.

    After an exception the hidden folder is removed. A killed process leaves it behind; the next
    call for the same path removes it.

    Args:
        path: Must not exist, or be an empty folder.
        need_bytes: Required free space.

    Raises:
        MolError: If `path` is a file or a folder with content, another process is writing it, the
            hidden folder's name is in use, or the disk has less free space than `need_bytes`.
    """
    path = expanded(path).resolve()
    with hidden_folder(path, PARTIAL):
        refuse_existing(path)
        _check_free_space(path.parent, need_bytes)
        staging = staging_folder(path)
        staging.mkdir()
        yield staging
        _sync_tree(staging)
        refuse_existing(path)
        staging.replace(path)
        _sync(path.parent)


def staging_folder(path: Path) -> Path:
    """Return the temporary folder of `output_folder`, for other processes that write into it."""
    # In the hidden folder, and not that folder itself, whose mark is not part of the output.
    return hidden_path(path, PARTIAL) / "output"


def refuse_existing(path: Path) -> None:
    """Check that an output path is free.

    If it is not, what a run left beside it is removed: it was killed after its last step.

    Raises:
        MolError: If `path` is a file or a folder with content, or its folder cannot be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        remove_leftovers(path)
        raise MolError(
            f"{path} exists and is not empty",
            allowed="a path that does not exist yet, or an empty folder",
            hint=f"give another path, or remove {path} first",
        )
    check_writable(path)


def remove_leftovers(path: Path) -> None:
    """Remove what a run left beside its complete output when it was killed after its last step."""
    for kind in (PARTIAL, SCRATCH):
        remove_leftover(hidden_path(path, kind))


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
    name = folder.with_name(f".{folder.name}.lock")
    lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


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
