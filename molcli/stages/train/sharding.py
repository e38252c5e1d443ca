"""Weights and gradients that several processes keep whole while a step lasts (FSDP2).

Otherwise a layer's weights are brought together for each of its passes, and its gradients added up
and shared out, in every micro-batch: three exchanges where a step needs two.
"""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from molcli.config.sections import TrainConfig
from molcli.estimate.parameters import count_parameters
from molcli.model import MoLConfig

# Of a GPU's memory: what weights and gradients may take, so that activations keep the most of it.
_SHARE = 1 / 3
_FP32 = 4


def keeps_whole(config: TrainConfig, model: MoLConfig, device: torch.device, ranks: int) -> bool:
    """Whether processes keep both whole from a step's first micro-batch to its last: as
    `train.sharding` says, and where it is "auto" if a GPU has the room."""
    if ranks == 1 or config.sharding != "auto":
        return ranks > 1 and config.sharding == "optimizer"
    if device.type != "cuda":
        return False
    both = 2 * _FP32 * count_parameters(model).total
    return both <= _SHARE * torch.cuda.get_device_properties(device).total_memory


def set_gradient_sync(student: nn.Module, *, now: bool) -> None:
    """Whether the next backward pass shares out gradients and lets go of the others' weights."""
    assert isinstance(student, FSDPModule)
    student.set_requires_gradient_sync(now)
    student.set_reshard_after_backward(now)


def reshard(model: nn.Module) -> None:
    """Lets go of the others' weights, after forward passes that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
