"""Start one training process for each GPU, and print an error of theirs only once."""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from molcli.errors import MolError
from molcli.ranks import is_main, ranks

if TYPE_CHECKING:  # imported when needed: help answers without it
    from molcli.config.sections import TrainConfig

# Seconds that processes have to finish a step and write a checkpoint after a signal. torch 2.11
# has no argument for it, and gives them 30.
_LAST_STEP = "120"
_PRINTED = "molcli/printed"
_ENOUGH = timedelta(seconds=10)  # for another process to print a message


class ChildExit(SystemExit):
    """Ends this process with the exit status of its children, which have printed their errors."""


def check_gpus(wanted: int) -> None:
    """Raise MolError if this machine has fewer GPUs."""
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
    checkpoint: Path,
    out: Path,
    config: "TrainConfig",
    processes: int,
    *,
    parent: bool,
    resume: bool,
) -> None:
    """Raise MolError for what every process would refuse. Called before they are started."""
    from molcli.config.stages import resolve
    from molcli.model.checkpoint import open_config
    from molcli.stages.train.batches import check_contexts, check_stages
    from molcli.stages.train.log import check_trackers
    from molcli.stages.train.output import check_output

    model, stages = open_config(checkpoint), resolve(config, has_parent=parent)
    check_trackers(config)
    check_stages(config, stages, processes, has_parent=parent)
    check_contexts(config, stages, model, None)
    check_output(out, resume=resume)


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `python arguments` in several connected processes, and wait for them.

    Errors are printed by the processes.

    Returns:
        The exit status: that of a process that failed, or 128 + the signal that this process got
        and passed on.
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
        # The agent ends the others by a signal, which makes their statuses negative. Those that
        # end because another one did have 1.
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    except SignalException as stop:
        return 128 + int(stop.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0


def leave_together() -> None:
    """End the connection between the processes. All of them must call this."""
    if ranks() > 1:
        from torch import distributed

        distributed.destroy_process_group()


@contextmanager
def first_to_print() -> Iterator[bool]:
    """Yield True in the first process that enters; the others wait until it has left.

    An error that all processes meet is so printed once, and also one that a single process meets
    and that ends the others.
    """
    if ranks() == 1:
        yield True
        return
    try:
        store = _store()
        first = store.add("molcli/prints", 1) == 1
        if not first:
            store.wait([_PRINTED], _ENOUGH)
    except (KeyError, RuntimeError):  # another launcher, or the first process did not finish
        yield is_main()
        return
    yield first
    if first:
        store.set(_PRINTED, "")


def follow_errors() -> Thread:
    """End this process, if it still runs, some seconds after another one has printed an error.

    It may be waiting for the other process in a GPU's kernel, where no signal handler runs.

    Returns:
        The thread that watches.
    """

    def watch() -> None:
        try:
            _store().wait([_PRINTED], timedelta(days=365))
        except (KeyError, RuntimeError):  # torchrun itself has ended
            return
        time.sleep(_ENOUGH.total_seconds())
        os._exit(1)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    return thread


def _store() -> Any:
    """Torchrun's key-value store, which outlives each of its processes.

    Raises KeyError without torchrun, and RuntimeError if the store cannot be reached.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=_ENOUGH)
