"""Open the dense parent that a command names."""

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:  # torch comes with it
    from molcli.families.parent import Parent


def open_dense(spec: str) -> "Parent":
    """The parent, checked; a limit that the user should hear of goes to stderr."""
    from molcli.families.parent import open_parent

    parent = open_parent(spec)
    if parent.note:
        typer.echo(f"note: {parent.note}", err=True)
    return parent
