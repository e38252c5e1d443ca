"""The figures of a command: printed, and written to the file of `--json`."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molcli.console import console
from molcli.errors import MolError

if TYPE_CHECKING:  # imported when something is printed
    from rich.console import RenderableType

Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures to this file.")
]


def check_json(path: Path | None) -> None:
    """Check before the work that the file of `--json` can be written after it.

    Raises:
        MolError: Its folder does not exist or cannot be written, or the path is a folder.
    """
    if path is None:
        return
    folder = path.resolve().parent
    if path.is_dir():
        raise MolError(
            f"--json is {path}, which is a folder",
            allowed="a file to write",
            hint=f"--json {path / 'figures.json'}",
        )
    if not folder.is_dir():
        raise MolError(
            f"--json is {path}, and there is no folder {folder}",
            allowed="a file in a folder that exists",
            hint=f"mkdir -p {folder}, or --json {path.name or 'figures.json'}",
        )
    # A regular file is replaced by a new one: its folder is written.
    written = path if path.exists() and not path.is_file() else folder
    if not _is_writable(written):
        raise MolError(
            f"--json is {path}, and {written} cannot be written",
            allowed="a file in a folder that you may write",
            hint=f"--json ~/{path.name}",
        )


def show_figures(
    parts: Iterable["RenderableType"], path: Path | None, figures: dict[str, Any]
) -> None:
    """Print the figures, then write them to the file of `--json`, if one is given."""
    printer = console()
    for part in parts:
        printer.print(part)
    write_json(path, figures)


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures to the file of `--json`, if one is given."""
    if path is not None:
        from molcli.files.json_files import write_object

        write_object(path, figures)


def _is_writable(path: Path) -> bool:
    """Whether the path can be written, not only by its mode: root may, and a disk may be read-only.

    A folder is tried with a file that is removed again.
    """
    if not path.is_dir():
        return os.access(path, os.W_OK)
    trial = path / f".molcli-{os.getpid()}.trial"
    try:
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except OSError:
        return False
    trial.unlink()
    return True
