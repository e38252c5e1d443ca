"""Attention inside short segments as an operator with gradients, which compiled code can hold."""

from typing import Any

import torch
from torch import Tensor

from molcli.kernels.packed_rows import PackedRows

LONGEST = 1024  # rows of a segment; for longer ones FlashAttention's larger tiles are quicker
WIDTHS = (16, 32, 64, 128)  # of heads, that a tile can have


def packed_attention(q: Tensor, k: Tensor, v: Tensor, rows: PackedRows) -> Tensor:
    """q: (M, h, d), k and v: (M, kv, d), d one of WIDTHS -> (M, h, d). One Triton kernel, two for
    the gradients."""
    return _forward(q, k, v, rows.segments, rows.cu_seqlens)[0]


@torch.library.custom_op(
    "molcli::packed_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor segments, Tensor cu_seqlens) -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    from molcli.kernels.segment_attention.triton_kernels import forward

    return forward(q, k, v, segments, cu_seqlens)


@_forward.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op(
    "molcli::packed_attention_backward",
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
    from molcli.kernels.segment_attention.triton_kernels import backward

    return backward(q, k, v, out, lse, segments, cu_seqlens, d_out)


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, segments, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, segments, cu_seqlens)
    ctx.set_materialize_grads(False)  # that of the log-sum-exp, which nothing reads, would be zeros


def _differentiate(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return None, None, None, None, None
    return *_backward(*ctx.saved_tensors, d_out), None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
