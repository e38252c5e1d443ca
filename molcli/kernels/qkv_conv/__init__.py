"""What the delta rule reads: convolution, SiLU and unit length of q, k and v, for many blocks."""

from typing import Any

import torch
from torch import Tensor

from molcli.kernels.backend import on_triton
from molcli.kernels.packed_rows import PackedRows
from molcli.kernels.qkv_conv.reference import qkv_conv_reference

__all__ = ["qkv_conv", "qkv_conv_reference"]


def qkv_conv(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    rows: PackedRows,
    start: Tensor,
    index: Tensor,
    state: Tensor | None,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (M, 3 * h * head_dim), q, k and v side by side; weights: (B, h * head_dim, 4) each, the
    filters of every block. start, index: (M,), the row's place in `state` and its number in its
    segment. state: (places, channels, 3), what came before the segments, or None for zeros.

    Returns q, k and v, (M, h, head_dim) in x's dtype; q and k have unit length. On CUDA in half
    precision one Triton kernel (three with gradients, which a state has none of); elsewhere
    elementary operations.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    if on_triton(x) and half and (state is None or not torch.is_grad_enabled()):
        return _qkv_conv(x, *weights, index, rows.offsets, start, state, head_dim)
    weight = rows.per_row(torch.cat(weights, dim=1))
    return qkv_conv_reference(x, weight, start, index, state, head_dim)


@torch.library.custom_op(
    "molcli::qkv_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor q_conv, Tensor k_conv, Tensor v_conv, Tensor index, Tensor offsets,"
    " Tensor start, Tensor? state, int head_dim) -> (Tensor, Tensor, Tensor)",
)
def _qkv_conv(
    x: Tensor,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    index: Tensor,
    offsets: Tensor,
    start: Tensor,
    state: Tensor | None,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from molcli.kernels.qkv_conv.triton_kernels import forward

    return forward(x, (q_conv, k_conv, v_conv), index, offsets, start, state, head_dim)


@_qkv_conv.register_fake
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1] // (3 * args[-1]), args[-1])
    return x.new_empty(shape), x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op(
    "molcli::qkv_conv_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor q_conv, Tensor k_conv, Tensor v_conv, Tensor index, Tensor offsets,"
    " int head_dim, Tensor dq, Tensor dk, Tensor dv) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _qkv_conv_backward(
    x: Tensor,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    index: Tensor,
    offsets: Tensor,
    head_dim: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from molcli.kernels.qkv_conv.triton_kernels import backward

    return backward(x, (q_conv, k_conv, v_conv), index, offsets, head_dim, (dq, dk, dv))


@_qkv_conv_backward.register_fake
def _(
    x: Tensor, q_conv: Tensor, k_conv: Tensor, v_conv: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (w.new_empty(w.shape) for w in (q_conv, k_conv, v_conv))
    return x.new_empty(x.shape), dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, ctx.head_dim = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _qkv_conv_backward(*ctx.saved_tensors, ctx.head_dim, dq, dk, dv)
    return *gradients, None, None, None, None, None


_qkv_conv.register_autograd(_differentiate, setup_context=_keep)
