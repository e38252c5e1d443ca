"""Parameter groups, learning-rate schedule, and the update by clipped, finite gradients."""

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
from molcli.model.layers import ConvertedLayer
from molcli.model.mixers import parameter_names
from molcli.stages.train.distributed import is_sharded, local_shard

# Suffixes of parameter names. Norms, biases and the parameters of the decay are not matrices that
# act on the residual: weight decay would pull them away from values that have a meaning.
_NO_DECAY = ("_norm", "_bias")
# Last parts of parameter names that no dense parent has. thin_in and thin_out act on the residual
# before any norm, where a few coordinates are a hundred times larger than the rest: they need
# smaller steps than weights behind a norm. Mixers name their own in `Mixer.new_parameters`.
_NEW = ("thin_in", "thin_out")


def is_new(name: str) -> bool:
    """Return whether a parameter has no counterpart in a dense parent.

    True for routers, the projections to and from the thin width, and DeltaNet's own parts.
    """
    parts = name.split(".")
    return "router" in parts or parts[-1] in (*_NEW, *parameter_names("new_parameters"))


def has_decay(name: str) -> bool:
    """Return whether AdamW's weight decay applies: to matrices, convolutions and embeddings."""
    exempt = (*_NO_DECAY, *parameter_names("no_decay_parameters"))
    return not name.endswith(exempt) and name != "model.norm.weight"


def set_trainable(model: MoLForCausalLM, part: str, *, routers: bool) -> None:
    """Let all parameters take gradients ("all"), or only Mixture of Layers layers ("mol").

    Args:
        model: changed in place.
        part: "all" or "mol".
        routers: whether those of the layers that train do, too.

    Raises:
        MolError: for "mol" if the model has no such layer.
    """
    model.requires_grad_(part == "all")
    layers = [layer for layer in model.model.layers if isinstance(layer, ConvertedLayer)]
    if part != "all" and not layers:
        raise MolError(
            "`train.trainable` is mol, but all layers of the model are dense",
            allowed="all, or a model with Mixture of Layers layers",
            hint="--set train.trainable=all",
        )
    for layer in layers:
        layer.requires_grad_(True)
        if layer.router is not None:
            layer.router.requires_grad_(routers)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Make AdamW with up to four parameter groups: new or inherited, with decay or without.

    Every parameter that takes a gradient is in exactly one of them. The key `peak` of a group is
    its largest learning rate.
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
    """Set the learning rate of each group to `ratio` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * ratio


def learning_rate_ratio(step: int, steps: int, config: TrainConfig) -> float:
    """Return the learning rate of a step relative to its peak.

    A linear warm-up from above 0, then a cosine that reaches min_learning_rate_ratio in the last
    step.

    Args:
        step: 0 to steps - 1.
        steps: of the stage.
        config: of the stage.
    """
    warmup = math.ceil(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / max(steps - warmup, 1)
    low = config.min_learning_rate_ratio
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, accelerator: Accelerator
) -> tuple[Tensor, Callable[[], bool]]:
    """Clip gradients and take an optimiser step, unless a gradient is not finite.

    Then weights, moments, step counts and gradients stay as they are. Collective.

    Args:
        model: with the gradients of a step.
        optimizer: of the model.
        max_norm: bound of the norm of all gradients together.
        accelerator: gives ranks.

    Returns:
        The 0-d norm before clipping, and a function that returns whether it is finite, the same on
        every rank. In one process with a fused optimiser, only that function synchronises with the
        device, and only up to the norm, not up to the end of the step.
    """
    with torch.no_grad():
        shards = [_local_parameter(p) for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in shards if p.grad is not None])
    if accelerator.num_processes > 1:
        norm = accelerator.reduce(norm.square(), "sum").sqrt()
    flag = norm.isfinite()
    is_finite = _read_later(flag)
    if accelerator.num_processes == 1 and all(g["fused"] for g in optimizer.param_groups):
        # As in torch's GradScaler: the kernels divide gradients by the first, and where the second
        # is 1 they write nothing. The bound is that of clip_grads_with_norm_.
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1)  # type: ignore[attr-defined]
        optimizer.found_inf = flag.logical_not().float()  # type: ignore[attr-defined]
        optimizer.step()
    elif is_finite():  # clipping would spread non-finite values, and hide where they began
        torch.nn.utils.clip_grads_with_norm_(shards, max_norm, norm)
        optimizer.step()
    return norm, is_finite


def _read_later(flag: Tensor) -> Callable[[], bool]:
    """Return a function that reads `flag`, and waits only for work queued before this call."""
    if not flag.is_cuda:
        return partial(bool, flag)
    copy, copied = flag.to("cpu", non_blocking=True), torch.cuda.Event()  # into pinned memory
    copied.record()

    def read() -> bool:
        copied.synchronize()
        return bool(copy)

    return read


def _local_parameter(parameter: Tensor) -> Tensor:
    """This rank's shard, with that of the gradient: operations on DTensors cost more."""
    if not is_sharded(parameter):
        return parameter
    assert parameter.grad is not None
    part = local_shard(parameter).detach()
    part.grad = local_shard(parameter.grad)
    return part
