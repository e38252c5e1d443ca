"""Progress bars on stderr, drawn from what a stage reports."""

from collections.abc import Iterator
from contextlib import contextmanager

from molcli.progress import Progress as Report
from molcli.progress import silent


@contextmanager
def bar(title: str) -> Iterator[Report]:
    """Yields the callable that a stage takes as `progress`.

    The bar stays on the screen with its time, unless an error comes before any work is done.
    Where stderr is no terminal, only its end shows.
    """
    # Imported when a bar is drawn: help and errors in arguments answer without it.
    from rich.console import Console
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
        # What a narrow terminal cuts is the note.
        TextColumn(
            "{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
        ),
    )
    console = Console(stderr=True)
    with _quiet_libraries(), Progress(*columns, console=console, expand=True) as progress:
        task = progress.add_task(title, total=None, note="")

        def report(done: int, total: int | None, note: str = "") -> None:
            # Counting from 0 again is another phase, such as training after reading.
            if done < progress.tasks[task].completed:
                progress.reset(task)
            progress.update(task, completed=done, total=total, note=note)

        try:
            yield report
        except BaseException:
            progress.update(task, visible=progress.tasks[task].completed > 0)
            raise


@contextmanager
def no_bar() -> Iterator[Report]:
    """As `bar`, in a process beside the one that draws: shows nothing."""
    with _quiet_libraries():
        yield silent


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keeps transformers' own bars, for loading and writing weights, off ours."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
