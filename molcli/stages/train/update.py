"""The optimiser's step, by clipped gradients, and by none that are not finite."""

from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from molcli.stages.train.ranks import is_shared, local


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
