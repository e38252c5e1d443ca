"""The router's logits: the residual, scaled to unit mean square, times the router's weight."""

from typing import Any

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.router_logits.reference import router_logits_reference

__all__ = ["router_logits", "router_logits_reference"]

# With more blocks, the sums no longer fit into a thread's registers, and a library's product is no
# longer slow: it fills its tiles.
MAX_BLOCKS = 32


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return W x / rms(x), computed in float32 or higher, under autocast too.

    On CUDA, up to MAX_BLOCKS blocks, this is one Triton kernel that reads `x` once; its backward
    pass is one kernel and a sum. cuBLAS would multiply float32 by so few columns at a tenth of the
    memory's speed. Elsewhere it is the reference.

    Args:
        x: (n, d), the residual.
        weight: (R, d), the router's weight for R blocks.

    Returns:
        (n, R), in float32, or float64 if `x` is.
    """
    if backend.use_triton(x) and weight.shape[0] <= MAX_BLOCKS:
        return _router_logits(x, weight)[0]
    with torch.autocast(x.device.type, enabled=False):
        return router_logits_reference(x, weight)


@torch.library.custom_op(
    "molcli::router_logits",
    mutates_args=(),
    schema="(Tensor x, Tensor weight) -> (Tensor, Tensor)",
)
def _router_logits(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, (n, R), and the scale of each row, 1 / rms(x), (n,)."""
    from molcli.kernels.router_logits.triton_kernels import forward

    return forward(x, weight)


@_router_logits.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, blocks = x.shape[0], weight.shape[0]
    logits = x.new_empty(rows, blocks, dtype=torch.float32)
    return logits, x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op(
    "molcli::router_logits_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor logits, Tensor scale, Tensor d_logits)"
    " -> (Tensor, Tensor)",
)
def _router_logits_backward(
    x: Tensor, weight: Tensor, logits: Tensor, scale: Tensor, d_logits: Tensor
) -> tuple[Tensor, Tensor]:
    from molcli.kernels.router_logits.triton_kernels import backward

    return backward(x, weight, logits, scale, d_logits)


@_router_logits_backward.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)  # else the gradient of the scale is allocated, as zeros


def _gradients(ctx: Any, d_logits: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if d_logits is None:
        return None, None
    return _router_logits_backward(*ctx.saved_tensors, d_logits)


_router_logits.register_autograd(_gradients, setup_context=_setup_context)
