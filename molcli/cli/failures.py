"""Print an error and choose the exit status: the user's input, the machine, or a bug."""

import os
import re
import traceback
from errno import (
    EACCES,
    EDQUOT,
    EEXIST,
    EFBIG,
    EISDIR,
    ELOOP,
    ENAMETOOLONG,
    ENOENT,
    ENOSPC,
    ENOTDIR,
    EPERM,
    EROFS,
)

from molcli.cli.distributed import first_to_print
from molcli.console import console, printable
from molcli.errors import Interrupted, MolError

DEBUG = "MOLCLI_DEBUG"
# Errors of the operating system that the user can mend: what is allowed, and what to do.
_ENVIRONMENT = (
    ((ENOSPC, EDQUOT, EFBIG), "room for all of the output", "free some space, or another disk"),
    (
        (EACCES, EPERM, EROFS),
        "paths that this user may read, and outputs where it is allowed to write",
        "another path, or other permissions (ls -ld shows them)",
    ),
    (
        (ENOENT, ENOTDIR, EISDIR, EEXIST, ELOOP, ENAMETOOLONG),
        "paths that exist, and outputs in a folder",
        "check the path",
    ),
)
# What torch raises on a CPU has no class of its own.
_NO_MEMORY = re.compile("can't allocate memory|not enough memory")
# Errors of gloo and NCCL in a process when another one was killed.
_PEER_GONE = re.compile("Connection closed by peer|Connection reset by peer|DistBackendError")


def explain(error: BaseException) -> int:
    """Print the error to stderr, in one of the processes that torchrun started.

    `MOLCLI_DEBUG=1` in the environment adds the traceback.

    Returns:
        The exit status. 2: the user can correct it (MolError, a full disk, a path). 128 + signal:
        interrupted, 130 by Ctrl-C. 1: the machine ran out of memory, or a bug.
    """
    from rich.text import Text

    status, lines = _lines(error)
    errors = console(stderr=True)
    with first_to_print() as here:
        for style, label, text in lines if here else ():
            errors.print(Text.assemble((label, style), printable(text)), soft_wrap=True)
        if os.environ.get(DEBUG):
            errors.print("".join(traceback.format_exception(error)), soft_wrap=True)
    return status


def _lines(error: BaseException) -> tuple[int, list[tuple[str, str, str]]]:
    """The exit status, and (style, label, text) of each line."""
    if isinstance(error, KeyboardInterrupt):
        return 130, [("bold yellow", "interrupted: ", "no output was left half-written")]
    if isinstance(error, Interrupted):
        lines = [("bold yellow", "interrupted: ", error.saved)]
        if error.resume:
            lines.append(("bold green", "resume: ", error.resume))
        return 128 + error.signal, lines
    if isinstance(error, MolError):
        parts = [
            ("bold red", "error: ", error.found),
            ("bold", "allowed: ", error.allowed),
            ("bold green", "try: ", error.hint),
        ]
        # A line each: a name with a line break must not look like another message.
        return 2, [
            (style, label, " ".join(text.splitlines())) for style, label, text in parts if text
        ]
    if isinstance(error, MemoryError | RuntimeError) and _is_out_of_memory(error):
        return 1, [
            ("bold red", "error: ", f"out of memory: {error}".rstrip(": ")),
            ("bold green", "try: ", "a smaller batch_size or micro_batch_size with --set"),
        ]
    if isinstance(error, RuntimeError) and _PEER_GONE.search(f"{type(error).__name__} {error}"):
        return 1, [("bold red", "error: ", "another process of this run ended without a message")]
    if isinstance(error, UnicodeDecodeError):
        return 2, [
            ("bold red", "error: ", f"a file is not text in UTF-8 ({error.reason})"),
            ("bold", "allowed: ", "text files in UTF-8"),
            ("bold green", "try: ", f"check the files that you gave; {DEBUG}=1 shows where"),
        ]
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        error = OSError(ELOOP, str(error))  # of Path.resolve, before Python 3.13
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        found = ("bold red", "error: ", f"{error.strerror}{where}")
        for numbers, allowed, hint in _ENVIRONMENT:
            if error.errno in numbers:
                return 2, [found, ("bold", "allowed: ", allowed), ("bold green", "try: ", hint)]
        return 1, [found]
    return 1, [
        ("bold red", "bug: ", f"{type(error).__name__}: {error}"),
        (
            "",
            "",
            "This is a bug in molcli, not in what you typed: a message like this should never",
        ),
        (
            "",
            "",
            f"appear. {DEBUG}=1 in front of the command shows the traceback to report with it.",
        ),
    ]


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return _NO_MEMORY.search(str(error)) is not None
