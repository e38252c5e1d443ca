"""Errors in the words of a command, found by typer: printed as all other errors are."""

from collections.abc import Sequence
from typing import Any

from typer import Abort
from typer.core import TyperGroup

from molcli.errors import MolError


class Commands(TyperGroup):
    """The group of all commands.

    typer would print a wrong option with the value as it was given: control characters in it would
    reach the terminal. Here it becomes a MolError.
    """

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **options: Any
    ) -> Any:
        """Run a command, and end with its exit status. Raises MolError for words typer refuses."""
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **options)
        try:
            status = super().main(args, standalone_mode=False, **options)
        except Abort as stop:  # how typer passes on an EOFError
            raise stop.__cause__ or stop from None
        except Exception as error:
            # typer 0.26 has no public name for the class of its errors.
            if not hasattr(error, "format_message"):
                raise
            if type(error).__name__ == "NoArgsIsHelpError":  # the help has been printed
                raise SystemExit(2) from error
            context = getattr(error, "ctx", None)
            command = "molcli" if context is None else context.command_path
            raise MolError(error.format_message(), hint=f"{command} --help") from error
        raise SystemExit(status if isinstance(status, int) else 0)
