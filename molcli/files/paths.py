"""Paths as a user gives them."""

from contextlib import suppress
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder in place of `~`; a name as it is where no user has it."""
    with suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)
