"""All that molcli prints goes through here, so that no name can control the terminal.

Names of files, tensors, recipe values and tokens come from others. Their control characters are
shown as escapes such as `\\x1b`, and their square brackets are no markup.
"""

import codecs
import io
import logging
import os
import sys
import warnings
from functools import cache
from typing import IO, TYPE_CHECKING, Any
from unicodedata import category

if TYPE_CHECKING:  # imported when something is printed
    from rich.console import Console


def printable(text: str, *, keep: str = "\n\t") -> str:
    r"""Return the text with control characters as escapes: ESC as `\x1b`, U+202E as `\u202e`.

    Escaped are control and format characters (of the terminal, and those that change the direction
    of text), separators of lines, parts of surrogate pairs, and what Unicode does not define.

    Args:
        text: Any text.
        keep: Characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep or _is_space(c) else _escape(c) for c in text)


def console(*, stderr: bool = False, file: IO[str] | None = None, **options: Any) -> "Console":
    """Return a rich console whose strings are text, not markup; style comes from `rich.text.Text`.

    A reader that has gone, as in `| head`, ends the output and not the command.

    Args:
        stderr: Print to stderr.
        file: Print to this stream.
        **options: Further arguments of rich's Console.
    """
    return _console_class()(
        stderr=stderr, file=file, markup=False, emoji=False, highlight=False, **options
    )


def say(text: str, *, stderr: bool = False, style: str | None = None) -> None:
    """Print a line as it is, however long. style: of rich, such as "dim"."""
    console(stderr=stderr).print(text, style=style, soft_wrap=True)


def note(text: str, *, label: str = "note") -> None:
    """Print a line on stderr, such as "note: the window is 4096"."""
    say(f"{label}: {text}", stderr=True)


def guard_streams() -> None:
    """Prepare stdout and stderr of a command: call it once, before anything is printed.

    A stream that cannot encode a character shows its escape. Messages of libraries, as log records
    and warnings, are made printable, too.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(_PrintableRecord)
    warnings.formatwarning = _printable_warning


@cache
def _console_class() -> type["Console"]:
    """The class, made when it is first used: rich takes a while to import."""
    from rich.console import Console
    from rich.text import Text

    class SafeConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            """Rich calls this for every string: printed ones, cells, titles and captions."""
            return super().render_str(printable(text), **options)

        def render(self, renderable: Any, options: Any = None) -> Any:
            """Text objects do not pass `render_str`; their length must stay, for their spans."""
            if isinstance(renderable, Text) and printable(renderable.plain) != renderable.plain:
                renderable = renderable.copy()
                renderable.plain = "".join(
                    c if printable(c) == c else "\N{REPLACEMENT CHARACTER}"
                    for c in renderable.plain
                )
            return super().render(renderable, options)

        def on_broken_pipe(self) -> None:
            """Nobody reads any more: write the rest to nowhere, and let the command finish."""
            self.quiet = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())
            os.close(nowhere)

    return SafeConsole


def _is_space(character: str) -> bool:
    return category(character) == "Zs"  # no-break spaces, which Python does not count as printable


def _escape(character: str) -> str:
    return codecs.encode(character, "unicode_escape").decode("ascii")


_format_warning = warnings.formatwarning


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


def _printable_warning(*arguments: Any, **options: Any) -> str:
    return printable(_format_warning(*arguments, **options))
