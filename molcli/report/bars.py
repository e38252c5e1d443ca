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
    from rich.progress import Progress


@contextmanager
def bar(title: str, *, shown: bool = True) -> Iterator[Report]:
    """Draw a bar while a stage works, in the main process of a run.

    The bar stays on the screen with its time, unless an error comes before any work is done.
    Where stderr is no terminal, only the finished bar is printed.

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
        task = progress.add_task(title, total=None, note="")

        def report(done: int, total: int | None, note: str = "") -> None:
            # A count that falls begins another phase, such as training after reading.
            if done < progress.tasks[task].completed:
                progress.reset(task)
            progress.update(task, completed=done, total=total, note=note)

        try:
            yield report
        except BaseException:
            progress.update(task, visible=progress.tasks[task].completed > 0)
            raise


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
        TextColumn("{task.description:<11}", table_column=whole),
        BarColumn(bar_width=16, table_column=whole),
        MofNCompleteColumn(table_column=whole),
        TimeElapsedColumn(table_column=whole),
        TimeRemainingColumn(table_column=whole),
        # In a narrow terminal, the note is cut.
        TextColumn(
            "{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
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
