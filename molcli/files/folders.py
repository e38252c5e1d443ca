"""Folders on the disk: outputs that appear whole or not at all, unfinished work, the cache."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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
    staging = staging_folder(path)
    staging.mkdir(exist_ok=True)
    with locked(staging, path):
        try:
            refuse_existing(path)
            _empty(staging)
            _refuse_full_disk(path.parent, need_bytes)
            yield staging
            _sync_tree(staging)
            staging.replace(path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _sync(path.parent)


def staging_folder(path: Path) -> Path:
    """Where `output_folder` has it written, for processes that write with the one that called."""
    path = path.expanduser().resolve()
    return path.with_name(f".{path.name}.partial")


def refuse_existing(path: Path) -> None:
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


SAVE_EVERY = 60.0  # seconds, at least; and saving takes at most a twentieth of the time
_SHARE = 20
_STATE = "state.safetensors"


class Unfinished:
    """A hidden folder beside `out`, for a run on the same path with the same identity, which nobody
    else may be at work on (`output_folder`).

    identity: of all that decides what the work comes to. folder: also for parts of the result,
    which are large, and written once.
    """

    def __init__(self, out: Path, identity: str) -> None:
        out = out.expanduser().resolve()
        self.folder = out.with_name(f".{out.name}.unfinished")
        self.identity = identity
        self._next = time.monotonic() + SAVE_EVERY

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A refusal ends the work for good; anything else leaves what has been saved, if any."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, MolError) or not (self.folder / _STATE).is_file():
                self.clear()
            raise

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """How many steps were done, and what they gave; None, and an empty folder, where there is
        nothing of use."""
        try:
            with safe_open(self.folder / _STATE, "pt") as file:
                about = file.metadata() or {}
                if about.get("identity") == self.identity:
                    names = file.keys()
                    return int(about["done"]), {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError, KeyError, ValueError):
            pass
        self.clear()
        self.folder.mkdir()
        return None

    def save(self, done: int, tensors: dict[str, Tensor]) -> None:
        """Every once in a while; otherwise does nothing. A kill leaves the state before it, and so
        does a full disk, which is reported where the result is written."""
        start = time.monotonic()
        if start < self._next:
            return
        on_host = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
        new = self.folder / f"{_STATE}.new"
        try:
            save_file(on_host, new, {"identity": self.identity, "done": str(done)})
            new.replace(self.folder / _STATE)
        except (OSError, SafetensorError):
            new.unlink(missing_ok=True)
        end = time.monotonic()
        self._next = end + max(SAVE_EVERY, _SHARE * (end - start))

    def clear(self) -> None:
        """The work is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def cache_folder() -> Path:
    """`molcli` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache); may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "molcli"


@contextmanager
def turn_at(folder: Path) -> Iterator[None]:
    """Waits while another process makes this folder of the cache, which may be there then."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The kernel drops the lock when its process dies, in whatever way; the file may stay.
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
