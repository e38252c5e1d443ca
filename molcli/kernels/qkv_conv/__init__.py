"""The inputs of the gated delta rule: short convolution, SiLU and unit length of q, k and v.

Source: Gated DeltaNet, arXiv 2412.06464, section 3.4.
"""

from typing import Any

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.packed_rows import PackedRows
from molcli.kernels.qkv_conv.reference import qkv_conv_reference, short_conv, short_conv_state

__all__ = ["qkv_conv", "qkv_conv_reference", "short_conv", "short_conv_state"]


def qkv_conv(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    rows: PackedRows,
    segment: Tensor,
    index: Tensor,
    state: Tensor | None,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve q, k and v inside segments, apply SiLU, and scale q and k to unit length.

    On CUDA in half precision this is one Triton kernel, with two more for gradients; with a state,
    which has no gradient there, only where gradients are disabled. Elsewhere it is the reference.

    Args:
        x: (M, 3 * H * head_dim), q, k and v of each row, concatenated.
        weights: the filters of q, k and v in every block, (B, H * head_dim, 4) each, oldest input
            first.
        rows: the layout of M rows in B blocks.
        segment: (M,) int64, each row's index into `state`.
        index: (M,) int64, how many rows of its own segment precede each row.
        state: (num_states, 3 * H * head_dim, 3), the inputs before each segment, oldest first; None
            for zeros.
        head_dim: channels of a head.

    Returns:
        q, k and v, (M, H, head_dim) each, in the dtype of `x`.
    """
    half = x.dtype in backend.HALF_DTYPES
    if backend.use_triton(x) and half and (state is None or not torch.is_grad_enabled()):
        return _qkv_conv(x, *weights, index, rows.offsets, segment, state, head_dim)
    weight = rows.gather_per_block(torch.cat(weights, dim=1))
    return qkv_conv_reference(x, weight, segment, index, state, head_dim)


@torch.library.custom_op(
    "molcli::qkv_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor q_conv, Tensor k_conv, Tensor v_conv, Tensor index, Tensor offsets,"
    " Tensor segment, Tensor? state, int head_dim) -> (Tensor, Tensor, Tensor)",
)
def _qkv_conv(
    x: Tensor,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    index: Tensor,
    offsets: Tensor,
    segment: Tensor,
    state: Tensor | None,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from molcli.kernels.qkv_conv.triton_kernels import forward

    return forward(x, (q_conv, k_conv, v_conv), index, offsets, segment, state, head_dim)


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, ctx.head_dim = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _qkv_conv_backward(*ctx.saved_tensors, ctx.head_dim, dq, dk, dv)
    return *gradients, None, None, None, None, None


_qkv_conv.register_autograd(_gradients, setup_context=_setup_context)
