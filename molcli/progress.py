"""How a stage says how far it is, without knowing who shows it."""

from typing import Protocol


class Progress(Protocol):
    """Called by a stage as work gets done; the command line draws a bar from it.

    done, total: in one unit of the stage's choice (tokens, rows, layers); total is None while it
    is unknown. note: a few words with the newest figures.
    """

    def __call__(self, done: int, total: int | None, note: str = "") -> None: ...


def silent(done: int, total: int | None, note: str = "") -> None:
    """The Progress of library use and tests: shows nothing."""
