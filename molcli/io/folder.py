"""Output folders that appear whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molcli.errors import MolError


@contextmanager
def output_folder(path: str | Path, *, need_bytes: int = 0) -> Iterator[Path]:
    """Yields a hidden staging folder beside `path`, which becomes `path` on success.

    An exception removes it; a killed run leaves it for the next run on the same path to remove.
    Raises MolError if `path` is a file or a non-empty folder, if another run is writing it, or
    if its disk has less than `need_bytes` bytes free.
    """
    path = Path(path).expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = staging_of(path)
    staging.mkdir(exist_ok=True)
    with _locked(staging, path):
        try:
            refuse_taken(path)
            _empty(staging)
            _refuse_full_disk(path.parent, need_bytes)
            yield staging
            _sync_tree(staging)
            staging.replace(path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _sync(path.parent)


def staging_of(path: Path) -> Path:
    """Where `output_folder` has it written, for processes that write with the one that called."""
    path = path.expanduser().resolve()
    return path.with_name(f".{path.name}.partial")


def refuse_taken(path: Path) -> None:
    """Raises MolError if `path` is a file or a non-empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise MolError(
            f"{path} exists and is not empty",
            allowed="a path that does not exist yet, or an empty folder",
            hint=f"give another path, or remove {path} first",
        )


def _refuse_full_disk(folder: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        need_gb, free_gb = need_bytes / 1e9, free / 1e9
        raise MolError(
            f"the output needs {need_gb:.2f} GB, and {folder} has {free_gb:.2f} GB free",
            allowed="a disk with room for the whole output",
            hint="free some space, or give a path on another disk",
        )


@contextmanager
def _locked(staging: Path, path: Path) -> Iterator[None]:
    """Holds the folder's lock, which the kernel drops when its process dies in whatever way."""
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        if not _try_lock(descriptor, staging):
            raise MolError(
                f"another run is writing {path}",
                allowed="one run per output path",
                hint="wait for it, or give another path",
            )
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, staging: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The other run may have renamed the folder since this one opened it.
        return os.path.samestat(os.fstat(descriptor), staging.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync_tree(folder: Path) -> None:
    """Brings files to the disk before the rename does, so that a power cut leaves no shell."""
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
