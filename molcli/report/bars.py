"""Progress bars on stderr or in a notebook, drawn from what a stage reports."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from molcli.console import console
from molcli.progress import Progress as Report
from molcli.progress import silent
from molcli.ranks import is_main

if TYPE_CHECKING:  # imported when a bar is drawn: help and errors in arguments come without it
    from rich.progress import Progress, TaskID


@contextmanager
def bar(title: str, *, shown: bool = True) -> Iterator[Report]:
    """Draw a bar while a stage works, in the main process of a run, and one for each phase.

    The bars stay on the screen with their times, but for those of work that did not begin.
    Where stderr is no terminal, only the finished bars are printed.

    Args:
        title: One word in front of the bar.
        shown: False draws nothing, and still hides the bars of libraries.

    Yields:
        The callable that a stage takes as `progress`.
    """
    if not shown or not is_main():
        with _quiet_libraries():
            yield silent
        return
    with _quiet_libraries(), _rich_progress() as progress:
        bars = _Bars(progress, title)
        try:
            yield bars
        finally:
            bars.hide_unused()


class _Bars:
    """The bars of a stage: one for the work, and one for each of its phases, as they come."""

    def __init__(self, progress: "Progress", title: str) -> None:
        self._progress, self._title = progress, title
        # It is shown before anything is counted, and then is the bar of whatever comes first.
        self._unused: TaskID | None = progress.add_task(title, total=None, note="")
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        self._report(self._title, done, total, note)

    def phase(self, name: str) -> Report:
        """Return the callback that draws the bar of a phase."""

        def report(done: int, total: int | None, note: str = "") -> None:
            self._report(name, done, total, note)

        return report

    def hide_unused(self) -> None:
        """Take away the bars of work that has not begun."""
        for task in self._progress.tasks:
            if not task.completed:
                self._progress.update(task.id, visible=False)

    def _report(self, name: str, done: int, total: int | None, note: str) -> None:
        task = self._tasks.get(name)
        if task is not None and done < self._progress.tasks[task].completed:
            task = None  # the phase comes again, such as reading for the next stage of a training
        if task is None:
            task, self._unused = self._unused, None
        if task is None:
            task = self._progress.add_task(name, total=total, note="")
        self._tasks[name] = task
        self._progress.update(task, description=name, completed=done, total=total, note=note)


def _rich_progress() -> "Progress":
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    whole = Column(no_wrap=True)
    columns = (
        TextColumn("{task.description:<11}", table_column=whole, markup=False),
        BarColumn(bar_width=16, table_column=whole),
        MofNCompleteColumn(table_column=whole),
        TimeElapsedColumn(table_column=whole),
        TimeRemainingColumn(table_column=whole),
        # In a narrow terminal, the note is cut.
        TextColumn(
            "{task.fields[note]}",
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            markup=False,
        ),
    )
    # In a notebook without ipywidgets rich would draw nothing and warn: print the finished bar.
    notebook = None if find_spec("ipywidgets") else False
    return Progress(*columns, console=console(stderr=True, force_jupyter=notebook), expand=True)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide transformers' own bars, for loading and writing weights."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
