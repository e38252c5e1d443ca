"""The router's logits: the residual at unit mean square, times one row for each block."""

from typing import Any

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.router_logits.reference import router_logits_reference

__all__ = ["router_logits", "router_logits_reference"]

# For more, sums do not fit into a thread's registers, and fill the tiles of a library's product.
MOST_BLOCKS = 32


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x: (n, d) residual, weight: (R, d) -> (n, R), float32, or float64 for such an x.

    On CUDA, up to MOST_BLOCKS, one Triton kernel that reads x once; one and a sum for gradients:
    cuBLAS multiplies float32 by so few columns at a tenth of the speed of reading. Elsewhere
    elementary operations, which autocast does not touch.
    """
    if backend.on_triton(x) and weight.shape[0] <= MOST_BLOCKS:
        return _router_logits(x, weight)[0]
    with torch.autocast(x.device.type, enabled=False):
        return router_logits_reference(x, weight)


@torch.library.custom_op(
    "molcli::router_logits",
    mutates_args=(),
    schema="(Tensor x, Tensor weight) -> (Tensor, Tensor)",
)
def _router_logits(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and what each row was multiplied by to have unit mean square, (n,)."""
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


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)  # that of the scale, which nothing reads, would be zeros


def _differentiate(ctx: Any, d_logits: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if d_logits is None:
        return None, None
    return _router_logits_backward(*ctx.saved_tensors, d_logits)


_router_logits.register_autograd(_differentiate, setup_context=_keep)
