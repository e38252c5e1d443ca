"""Interface through which a stage reports its progress; the caller decides how to display it."""

from typing import Protocol


class Progress(Protocol):
    """Callback that a stage calls as work gets done.

    Args:
        done: Finished amount, in a unit of the stage's choice (tokens, rows, layers).
        total: Total amount in the same unit; None while it is unknown.
        note: The newest figures, in a few words.
    """

    def __call__(self, done: int, total: int | None, note: str = "") -> None: ...


def silent(done: int, total: int | None, note: str = "") -> None:
    """Ignore progress: the default for library use and tests."""
