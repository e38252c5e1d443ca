"""The processes of a run: how they start and stop, how the model is sharded, how they agree.

Weights, gradients and moments are sharded by torch's FSDP2: the weights of a layer are gathered
while it runs. With one process nothing is wrapped. "Rank" is the field's word for one process.
"""

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from molcli.config.sections import TrainConfig
from molcli.errors import MolError
from molcli.estimate.parameters import count_parameters
from molcli.model import MoLConfig
from molcli.model.checkpoint import default_device

_THREADS = 4  # on the CPU, beside a GPU
# Fraction of a GPU's memory that unsharded weights and gradients may take: activations need more.
_UNSHARDED_FRACTION = 1 / 3
_BYTES_FP32 = 4
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def create_accelerator(config: TrainConfig, out: Path) -> Accelerator:
    """Join the processes that torchrun started, or start alone.

    accelerate gives the rank, the device, collectives and trackers. It prepares no model: autocast
    and FSDP2 are torch's own.

    Args:
        config: the train section; its trackers are started later, by `trackers.open_trackers`.
        out: folder of the run, where TensorBoard writes.

    Raises:
        MolError: if more processes run on this machine than it has GPUs, and it has any.
    """
    cpu = default_device().type == "cpu"
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu and local_ranks > torch.cuda.device_count():
        raise MolError(
            f"{local_ranks} processes run on this machine, and torch finds "
            f"{torch.cuda.device_count()} GPUs",
            allowed="one process for each GPU",
            hint=f"--nproc-per-node={torch.cuda.device_count()}",
        )
    if not cpu:
        # Between two steps the CPU has little to do, and waking its threads for that takes longer:
        # a tenth of a second in a container with fewer cores than threads. torchrun sets 1.
        torch.set_num_threads(min(_THREADS, torch.get_num_threads()))
    # Checkpoints are written in the background, through gloo.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    groups = [InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")] if several and not cpu else None
    return Accelerator(
        cpu=cpu,
        log_with=list(config.trackers) or None,
        project_dir=out,
        kwargs_handlers=groups,
    )


def uses_optimizer_sharding(
    config: TrainConfig, model: MoLConfig, device: torch.device, ranks: int
) -> bool:
    """Decide whether only moments stay sharded during a step.

    Weights and gradients are then unsharded from the first micro-batch of a step to the last, which
    takes two collectives a step: gather weights, reduce gradients. Otherwise each micro-batch takes
    three: gather weights for the forward pass, gather them for the backward pass, reduce gradients.

    Args:
        config: `train.sharding` decides; "auto" is "optimizer" where a GPU has the room.
        model: counts the weights, in float32.
        device: of this rank.
        ranks: processes of the run; with one, nothing is sharded.
    """
    if ranks == 1 or config.sharding != "auto":
        return ranks > 1 and config.sharding == "optimizer"
    if device.type != "cuda":
        return False
    weights_and_gradients = 2 * _BYTES_FP32 * count_parameters(model).total
    memory = torch.cuda.get_device_properties(device).total_memory
    return weights_and_gradients <= _UNSHARDED_FRACTION * memory


def shard(module: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool) -> None:
    """Shard the parameters of `module` that are not sharded yet over the ranks of `mesh` (FSDP2).

    Weights are gathered in float32, and autocast as in one process: router, norms and decay are
    float32 there, too.
    """

    # accelerate could prepare the model, too, but shards the first dimension of each weight only,
    # which is 1 in shared blocks and dense layers: the first rank would hold all of them.
    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dimension(parameter.shape, mesh.size()))

    fully_shard(
        module,
        mesh=mesh,
        shard_placement_fn=placement,
        reshard_after_forward=reshard_after_forward,
    )


def shard_dimension(shape: torch.Size, ranks: int) -> int:
    """Return the first dimension that `ranks` divides, or 0 if there is none."""
    return next((d for d, size in enumerate(shape) if size % ranks == 0), 0)


def set_gradient_sync(student: nn.Module, *, now: bool) -> None:
    """Set whether the next backward pass reduces gradients over ranks and reshards weights."""
    assert isinstance(student, FSDPModule)
    student.set_requires_gradient_sync(now)
    student.set_reshard_after_backward(now)


def reshard(model: nn.Module) -> None:
    """Free the weights gathered from other ranks, after forward passes without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each rank holds a part of the tensor."""
    return isinstance(tensor, DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which shares its memory; all of an unsharded one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather all of a tensor on every rank. Collective: if it is sharded, every rank calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, value: Tensor) -> Tensor:
    """Shard `value`, which every rank holds, as `tensor` is sharded. Not a collective."""
    if not isinstance(tensor, DTensor):
        return value
    mesh, placements = tensor.device_mesh, tensor.placements
    # Copied: a view would keep all of `value` in memory.
    return distribute_tensor(value, mesh, placements, src_data_rank=None).clone()


def first_error(message: str, accelerator: Accelerator) -> str:
    """Return the message of the first rank that has one, else "". Collective."""
    if accelerator.num_processes == 1:
        return message
    return next(filter(None, gather_object([message])), "")


class StopSignals:
    """Context manager that records SIGINT and SIGTERM, so that the step at hand can finish.

    A second signal acts as if there were no handler; not under torchrun, which sends one more for
    every Ctrl-C. A signal that was ignored before, as SIGINT is in the background jobs of a script,
    stays ignored. Python delivers signals to its main thread only: in another thread nothing is
    recorded.

    Attributes:
        received: number of the last signal, 0 if there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            handled = (n for n in _STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN)
            self._previous = {number: signal.signal(number, self._record) for number in handled}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def agree(self, accelerator: Accelerator) -> int:
        """Return a signal that any rank received, 0 if none did. Collective."""
        if accelerator.num_processes == 1:
            return self.received
        received = torch.tensor([self.received], device=accelerator.device)
        return int(accelerator.gather(received).max())

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received and "LOCAL_WORLD_SIZE" not in os.environ:
            self._restore()
            signal.raise_signal(number)
        self.received = number

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
