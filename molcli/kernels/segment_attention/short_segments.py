"""Attention inside short segments: Triton kernels as a custom operator with gradients."""

from typing import Any

import torch
from torch import Tensor

from molcli.kernels.packed_rows import PackedRows

MAX_SEGMENT_LENGTH = 1024  # in longer segments FlashAttention's larger tiles are faster
HEAD_DIMS = (16, 32, 64, 128)  # that a tile can have


def short_segment_attention(q: Tensor, k: Tensor, v: Tensor, rows: PackedRows) -> Tensor:
    """Attend inside segments with one Triton kernel, and with two for the gradients.

    Args:
        q, k, v, rows: as for `segment_attention`; d is one of HEAD_DIMS.

    Returns:
        (M, H, d), in the dtype of `q`.
    """
    return _forward(q, k, v, rows.segments, rows.cu_seqlens)[0]


@torch.library.custom_op(
    "molcli::short_segment_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor segments, Tensor cu_seqlens) -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm of each row's softmax sum, (M, H)."""
    from molcli.kernels.segment_attention.triton_kernels import forward

    return forward(q, k, v, segments, cu_seqlens)


@_forward.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op(
    "molcli::short_segment_attention_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor segments,"
    " Tensor cu_seqlens, Tensor d_out) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    cu_seqlens: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. out, lse: as `_forward` returned them."""
    from molcli.kernels.segment_attention.triton_kernels import backward

    return backward(q, k, v, out, lse, segments, cu_seqlens, d_out)


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, segments, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, segments, cu_seqlens)
    ctx.set_materialize_grads(False)  # else the gradient of lse is allocated, as zeros


def _gradients(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return None, None, None, None, None
    return *_backward(*ctx.saved_tensors, d_out), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
