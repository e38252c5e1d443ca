"""The callable by which a stage reports its progress, whoever shows it."""

from typing import Protocol


class Progress(Protocol):
    """Called by a stage as work gets done; a progress bar is drawn from it.

    done, total: in a unit of the stage's choice (tokens, rows, layers); total is None while it is
    unknown. note: a few words with the newest figures.
    """

    def __call__(self, done: int, total: int | None, note: str = "") -> None: ...


def silent(done: int, total: int | None, note: str = "") -> None:
    """Show nothing."""
