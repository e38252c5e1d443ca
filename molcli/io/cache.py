"""Where molcli keeps what it would otherwise fetch or convert again."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
