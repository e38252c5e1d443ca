"""Learning rates and decay of each parameter, and the update by clipped, finite gradients."""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from molcli.config.sections import TrainConfig
from molcli.errors import MolError
from molcli.model import MoLForCausalLM
from molcli.model.layers import MoLLayer
from molcli.model.mixers import parameter_names
from molcli.stages.train.distributed import is_shared, local

# Last parts of parameter names. Norms, biases and the decay's parameters are not matrices that
# act on the residual: weight decay would pull them towards a value that means something.
_NO_DECAY = ("_norm", "_bias")
# No dense parent has these. thin_in and thin_out touch the residual as it is, a few of whose
# coordinates are a hundred times larger than the rest: they want smaller steps than what stands
# behind a norm. Gated DeltaNet's own parts start from an initialisation.
_NEW = ("thin_in", "thin_out")


def is_new(name: str) -> bool:
    """Whether the parameter has no counterpart in a dense parent: router, the projections to and
    from the thin width, DeltaNet's own parts."""
    parts = name.split(".")
    return "router" in parts or parts[-1] in (*_NEW, *parameter_names("new_parameters"))


def has_decay(name: str) -> bool:
    """Whether AdamW's weight decay applies: to matrices, convolutions and embeddings."""
    exempt = (*_NO_DECAY, *parameter_names("no_decay_parameters"))
    return not name.endswith(exempt) and name != "model.norm.weight"


def set_trainable(model: MoLForCausalLM, part: str) -> None:
    """Leaves gradients to all ("all") or to the Mixture of Layers layers alone ("mol").

    Raises MolError if there are none of those.
    """
    model.requires_grad_(part == "all")
    if part == "all":
        return
    layers = [layer for layer in model.model.layers if isinstance(layer, MoLLayer)]
    if not layers:
        raise MolError(
            "`train.trainable` is mol, but all layers of the model are dense",
            allowed="all, or a model with Mixture of Layers layers",
            hint="--set train.trainable=all",
        )
    for layer in layers:
        layer.requires_grad_(True)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with up to four groups, new or inherited, decayed or not; `peak` is a group's lr.

    Every parameter that takes a gradient is in exactly one of them.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trainable.items():
        groups[is_new(name), has_decay(name)].append(parameter)
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(map(id, trainable.values()))
    options: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decay else 0.0,
            "peak": config.new_learning_rate if new else config.learning_rate,
        }
        for (new, decay), parameters in groups.items()
    ]
    on_gpu = all(parameter.is_cuda for parameter in trainable.values())
    return torch.optim.AdamW(options, lr=config.learning_rate, betas=config.betas, fused=on_gpu)


def set_learning_rates(optimizer: torch.optim.Optimizer, ratio: float) -> None:
    """Sets each group's lr to `ratio` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * ratio


def learning_rate_ratio(step: int, steps: int, config: TrainConfig) -> float:
    """Of the peak, at `step` of 0 to steps - 1: linear warm-up from above 0, then a cosine that
    reaches min_learning_rate_ratio in the last step.
    """
    warmup = math.ceil(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / max(steps - warmup, 1)
    low = config.min_learning_rate_ratio
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, largest: float, accelerator: Accelerator
) -> tuple[Tensor, Callable[[], bool]]:
    """Steps by gradients whose norm, of all of them together, is at most `largest`. If the norm is
    not finite, weights, moments, step counts and gradients stay as they are.

    Returns the norm before, 0-d, and what says whether it is finite, the same on every rank. In one
    process with a fused optimiser that alone waits for the device: for the norm, not for the step.
    """
    with torch.no_grad():
        mine = [_own_part(p) for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in mine if p.grad is not None])
    if accelerator.num_processes > 1:
        norm = accelerator.reduce(norm.square(), "sum").sqrt()
    flag = norm.isfinite()
    finite = _asked(flag)
    if accelerator.num_processes == 1 and all(g["fused"] for g in optimizer.param_groups):
        # As torch's GradScaler does: the kernels divide gradients by the first, and where the
        # second is 1 they write nothing. The bound is clip_grads_with_norm_'s.
        optimizer.grad_scale = ((norm + 1e-6) / largest).clamp(min=1)  # type: ignore[attr-defined]
        optimizer.found_inf = flag.logical_not().float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite():  # clipping would spread what is not, and hide where it began
        torch.nn.utils.clip_grads_with_norm_(mine, largest, norm)
        optimizer.step()
    return norm, finite


def _asked(flag: Tensor) -> Callable[[], bool]:
    """Says what the flag is, and waits only for what the device was given before this call."""
    if not flag.is_cuda:
        return partial(bool, flag)
    told, here = flag.to("cpu", non_blocking=True), torch.cuda.Event()  # into pinned memory
    here.record()

    def answer() -> bool:
        here.synchronize()
        return bool(told)

    return answer


def _own_part(parameter: Tensor) -> Tensor:
    """This rank's part with that of the gradient: no DTensor, whose operations cost more."""
    if not is_shared(parameter):
        return parameter
    assert parameter.grad is not None
    part = local(parameter).detach()
    part.grad = local(parameter.grad)
    return part
