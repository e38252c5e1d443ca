"""The processes of a run: how the model lies in them, and how they agree.

torch's FSDP2: every process holds a share of each weight, of its gradient and of the optimiser's
moments; a layer's weights are brought together while it runs. In one process nothing is wrapped.
"""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from molcli.config.sections import TrainConfig
from molcli.errors import MolError
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import default_device
from molcli.stages.train.balance import RouterLoads
from molcli.stages.train.objective import Student

_THREADS = 4  # beside a GPU


def open_ranks(config: TrainConfig, out: Path) -> Accelerator:
    """The processes that torchrun started, or this one alone.

    Raises MolError if there are more of them on this machine than GPUs, where it has any.
    """
    cpu, here = default_device().type == "cpu", int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu and here > torch.cuda.device_count():
        raise MolError(
            f"{here} processes run on this machine, and it shows {torch.cuda.device_count()} GPUs",
            allowed="one process for each GPU",
            hint=f"--nproc-per-node={torch.cuda.device_count()}",
        )
    if not cpu:
        # What the CPU does between two steps is small, and waking its threads for it takes longer,
        # in a container with fewer cores than they are a tenth of a second. torchrun starts with 1.
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


def make_student(
    model: MoLForCausalLM, dtype: torch.dtype, accelerator: Accelerator, *, whole: bool = False
) -> Student:
    """The model with its losses; several processes share it, each on its device. whole: a layer's
    weights stay on each of them until the backward pass (`sharding.keeps_whole`).

    Weights are gathered in float32, and autocast as in one process: router, norms and decay are
    float32 there, too. Every parameter must take a gradient at this point.
    """
    ranks = accelerator.num_processes
    if ranks == 1:
        return Student(model, dtype, RouterLoads(model), whole=whole)
    mesh = init_device_mesh(accelerator.device.type, (ranks,))

    # accelerate would prepare the model, too, but along the first dimension of each weight alone,
    # which is 1 in shared blocks and dense layers: all of them would lie in the first process.
    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(shared_dimension(parameter.shape, ranks))

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement, reshard_after_forward=not whole)
    student = Student(model, dtype, RouterLoads(model), whole=whole)
    # What is kept after a forward pass without a backward pass would be stale after the next step.
    fully_shard(student, mesh=mesh, shard_placement_fn=placement, reshard_after_forward=True)
    # FSDP takes the first module that runs for the whole; alignment runs layers alone.
    register_fsdp_forward_method(student, Student.begin.__name__)
    student.begin(torch.zeros((), device=accelerator.device))
    return student


def shared_dimension(shape: torch.Size, ranks: int) -> int:
    """Along which a weight is cut: the first that `ranks` divides, or else the first of all."""
    return next((d for d, size in enumerate(shape) if size % ranks == 0), 0)


def is_shared(tensor: Tensor) -> bool:
    """Whether each rank holds a part of it."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; where it is shared, every rank calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """`value`, or this rank's part of it where `tensor` is shared. No rank waits for another."""
    if not isinstance(tensor, DTensor):
        return value
    mesh, placements = tensor.device_mesh, tensor.placements
    # Copied: a view would keep the whole in memory.
    return distribute_tensor(value, mesh, placements, src_data_rank=None).clone()


def first_message(message: str, accelerator: Accelerator) -> str:
    """The message of the first rank that has one, "" if none has; every rank calls this."""
    if accelerator.num_processes == 1:
        return message
    return next(filter(None, gather_object([message])), "")
