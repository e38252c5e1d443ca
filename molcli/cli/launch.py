"""One process for each GPU of this machine, through torchrun's own agent."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from molcli.config.sections import TrainConfig
from molcli.config.stages import resolve
from molcli.errors import MolError

# Seconds that processes have to finish a step and write a checkpoint after a signal; torch 2.11
# does not ask, and gives them 30.
_LAST_STEP = "120"


class Told(SystemExit):
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
    from molcli.stages.train.checks import check_stages
    from molcli.stages.train.output import refuse_folder
    from molcli.stages.train.trackers import check_trackers

    open_config(checkpoint)
    check_trackers(config)
    check_stages(config, resolve(config, has_parent=parent), processes, has_parent=parent)
    refuse_folder(out, resume=resume)


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
