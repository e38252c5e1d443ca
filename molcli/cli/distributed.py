"""Start one process for each GPU, and know which of them this one is."""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

from molcli.config.sections import TrainConfig
from molcli.config.stages import resolve
from molcli.errors import MolError

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


# Seconds that processes have to finish a step and write a checkpoint after a signal; torch 2.11
# does not ask, and gives them 30.
_LAST_STEP = "120"


class ChildExit(SystemExit):
    """Ends this process with the status of others, which have said what there was to say."""


def check_gpus(wanted: int) -> None:
    """Raises MolError unless this machine shows so many."""
    import torch

    found = torch.cuda.device_count()
    if wanted > found:
        raise MolError(
            f"--gpus is {wanted}, and this machine shows {found or 'no'} GPU{'s' * (found > 1)}",
            allowed=f"1 to {found}" if found else "a machine with GPUs",
            hint=f"--gpus {found}"
            if found
            else "torchrun --nproc-per-node=N -m molcli train ... runs N processes on the CPU",
        )


def check_run(
    checkpoint: Path, out: Path, config: TrainConfig, processes: int, *, parent: bool, resume: bool
) -> None:
    """Raises MolError for what every process would refuse."""
    from molcli.model.checkpoint import open_config
    from molcli.stages.train.batches import check_stages
    from molcli.stages.train.log import check_trackers
    from molcli.stages.train.output import check_output

    open_config(checkpoint)
    check_trackers(config)
    check_stages(config, resolve(config, has_parent=parent), processes, has_parent=parent)
    check_output(out, resume=resume)


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs `python arguments` in so many processes that find each other.

    Returns the exit status: that of a process that failed, or 128 + the signal that this one got
    and passed on. What went wrong, the processes say themselves.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _LAST_STEP)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        # The agent ends the others by a signal, which makes their statuses negative; those that
        # end because another one did have 1.
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    except SignalException as stop:
        return 128 + int(stop.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0
