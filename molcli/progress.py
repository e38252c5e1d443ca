"""Interface through which a stage reports its progress; the caller decides how to display it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Callback that a stage calls as work gets done.

    `done` does not fall, is at most `total`, and equals it at the end. Work of another kind, such
    as the reading of text before a training, has a count of its own: see `phase`.

    Args:
        done: Finished amount, in a unit of the stage's choice (tokens, rows, layers).
        total: Total amount in the same unit; None while it is unknown.
        note: The newest figures, in a few words.
    """

    def __call__(self, done: int, total: int | None, note: str = "") -> None: ...


def silent(done: int, total: int | None, note: str = "") -> None:
    """Ignore progress: the default for library use and tests."""


def phase(progress: Progress, name: str) -> Progress:
    """Return the callback for a phase with a count of its own.

    Args:
        progress: The callback of the work. Its method `phase(name)`, if it has one, returns the
            phase's callback; a callback without the method hears of the main work only.
        name: A word or two, such as "reading". A phase that has ended may come again.
    """
    begin = getattr(progress, "phase", None)
    return silent if begin is None else begin(name)


@contextmanager
def step(progress: Progress, name: str) -> Iterator[None]:
    """Report the work inside as a phase of one step, which takes a while."""
    report = phase(progress, name)
    report(0, 1)
    yield
    report(1, 1)
