"""Hidden folders beside an output, in which molcli works until the output is complete.

A mark, a file that is made first and removed last, tells them from folders of the user. What a
killed run left has it, and the next run on the same path takes it over or removes it. Nothing else
that has such a name is touched, and no link is followed.
"""

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from molcli.errors import MolError
from molcli.files.paths import expanded

PARTIAL = "partial"  # what becomes the output
SCRATCH = "scratch"  # what a command needs on the way, such as sampled text
UNFINISHED = "unfinished"  # what the next run continues from
_MARK = ".molcli"


def hidden_path(path: Path, kind: str) -> Path:
    """Return the path of a hidden folder beside an output.

    Args:
        path: Of the output.
        kind: `PARTIAL`, `SCRATCH` or `UNFINISHED`.
    """
    path = expanded(path).resolve()
    return path.with_name(f".{path.name}.{kind}")


@contextmanager
def hidden_folder(path: Path, kind: str) -> Iterator[Path]:
    """Yield an empty hidden folder beside an output, and remove it at the end.

    One process at a time holds it. A killed process leaves it behind; the next call for the same
    path and kind empties it.

    Args:
        path: Of the output. Its parent is made if it does not exist.
        kind: `PARTIAL` or `SCRATCH`.

    Raises:
        MolError: If another process holds the folder, or molcli did not make it.
    """
    folder = hidden_path(path, kind)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        make_hidden(folder)
        with locked(folder, path):
            make_hidden(folder)  # another process may have removed its content, and the mark
            clear_hidden(folder)
            yield folder
    finally:
        remove_leftover(folder)


def make_hidden(folder: Path) -> None:
    """Make a hidden folder, or take over what a killed run left, with its content.

    Raises:
        MolError: If something that molcli did not make has the name.
    """
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        refuse_foreign(folder)
        # Another process may remove its folder of this name at any moment: then make it again.
        with suppress(FileNotFoundError):
            # Not for writing: the mark is always empty, at whatever moment a run is killed.
            flags = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW
            os.close(os.open(folder / _MARK, flags, 0o666))
            return


def refuse_foreign(folder: Path) -> None:
    """Check that the name of a hidden folder is free, or that molcli made what has it.

    Raises:
        MolError: If not.
    """
    if not is_ours(folder) and os.path.lexists(folder) and not is_ours(folder):
        raise MolError(
            f"{folder} is in the way: molcli did not make it",
            allowed="an output path beside which this name is free",
            hint=f"move {folder} elsewhere, or give another output path",
        )


def is_ours(folder: Path) -> bool:
    """Whether molcli made a folder: it has the mark, or is empty, as after a kill at once."""
    try:
        while stat.S_ISDIR(folder.lstat().st_mode):
            names = [entry.name for entry in folder.iterdir()]
            if _MARK not in names:
                return not names
            with suppress(FileNotFoundError):  # another process removes its folder: look again
                mark = (folder / _MARK).lstat()
                # An empty file, and no other name of a file of the user.
                return stat.S_ISREG(mark.st_mode) and mark.st_size == 0 and mark.st_nlink == 1
    except FileNotFoundError:
        pass
    return False


def hidden_content(folder: Path) -> list[Path]:
    """Return all that is in a hidden folder but its mark."""
    return [entry for entry in folder.iterdir() if entry.name != _MARK]


def clear_hidden(folder: Path) -> None:
    """Remove all that is in a hidden folder but its mark."""
    for entry in hidden_content(folder):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def remove_hidden(folder: Path) -> None:
    """Remove a hidden folder, if molcli made it. Its mark goes last: a kill leaves it ours."""
    if not is_ours(folder):
        return
    with suppress(FileNotFoundError):  # another process removes it, too
        clear_hidden(folder)
        (folder / _MARK).unlink(missing_ok=True)
        folder.rmdir()


def remove_leftover(folder: Path) -> None:
    """Remove a hidden folder, if molcli made it and no process holds it."""
    try:
        _remove_if_free(folder)
    except OSError:  # what cannot be removed stays, and is no reason to fail
        pass
    except BaseException:  # a signal: the removal is short
        with suppress(OSError):
            _remove_if_free(folder)
        raise


def _remove_if_free(folder: Path) -> None:
    if not is_ours(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if _try_lock(descriptor, folder):
            remove_hidden(folder)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder, which the kernel drops when its process dies.

    Args:
        folder: Exists.
        path: What is written, for the message.

    Raises:
        MolError: If another process holds the lock.
    """
    busy = MolError(
        f"another run is writing {path}",
        allowed="one run per output path",
        hint="wait for it, or give another path",
    )
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError as error:  # that run has just ended, and removed it
        raise busy from error
    try:
        if not _try_lock(descriptor, folder):
            raise busy
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The other run may have renamed or removed the folder since this one opened it.
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
