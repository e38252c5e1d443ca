"""The figures of a command: printed, and written to the file of `--json`."""

import os
import shlex
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
            hint=f"mkdir -p {shlex.quote(str(folder))}",
        )
    if path.exists() and not path.is_file() and not os.access(path, os.W_OK):  # a pipe or a device
        raise MolError(f"--json is {path}, which cannot be written", allowed="a file to write")
    from molcli.files.writable import check_writable

    check_writable(path)


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
