"""What this process is among those that torchrun started, and which of them speaks."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from typing import Any

_SPOKEN = "molcli/spoken"
_ENOUGH = timedelta(seconds=10)  # for another process to print a message


def ranks() -> int:
    """Processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process prints what all of them would."""
    return os.environ.get("RANK", "0") == "0"


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_WORLD_SIZE" in os.environ


def leave_together() -> None:
    """Ends the connection between the processes, which all have come to this point."""
    if ranks() > 1:
        from torch import distributed

        distributed.destroy_process_group()


@contextmanager
def one_speaks() -> Iterator[bool]:
    """True in the first process that comes here; the others wait until it has left.

    All meet the same error, or one alone does and ends the others: it is told once in any case.
    """
    if ranks() == 1:
        yield True
        return
    try:
        store = _store()
        first = store.add("molcli/speaks", 1) == 1
        if not first:
            store.wait([_SPOKEN], _ENOUGH)
    except (KeyError, RuntimeError):  # another launcher, or nobody said that all was said
        yield is_main()
        return
    yield first
    if first:
        store.set(_SPOKEN, "")


def follow_errors() -> Thread:
    """Ends this process some seconds after another one has told why it ends, if it still runs.

    It may be waiting for that one in a GPU's kernel, where no signal's handler gets a turn.
    Returns the thread that watches.
    """

    def watch() -> None:
        try:
            _store().wait([_SPOKEN], timedelta(days=365))
        except (KeyError, RuntimeError):  # torchrun itself has ended
            return
        time.sleep(_ENOUGH.total_seconds())
        os._exit(1)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    return thread


def _store() -> Any:
    """That of torchrun, which outlives any of its processes. Raises KeyError without torchrun, and
    RuntimeError if it cannot be reached."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=_ENOUGH)
