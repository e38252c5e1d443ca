"""Causal softmax attention in which a row sees the rows of its own segment only."""

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from molcli.kernels import backend
from molcli.kernels.packed_rows import PackedRows
from molcli.kernels.segment_attention.reference import segment_attention_reference
from molcli.kernels.segment_attention.short_segments import (
    HEAD_DIMS,
    MAX_SEGMENT_LENGTH,
    short_segment_attention,
)

__all__ = ["segment_attention", "segment_attention_reference"]

# torch 2.10 takes `is_causal=True`; later releases take a window.
_PARAMETERS = inspect.signature(varlen_attn).parameters
_CAUSAL: dict[str, Any] = (
    {"window_size": (-1, 0)} if "window_size" in _PARAMETERS else {"is_causal": True}
)


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: PackedRows,
    window: int | None = None,
    time: Tensor | None = None,
) -> Tensor:
    """Attend to the earlier rows of each row's own segment, and to the row itself.

    On CUDA in half precision this is SDPA on a batch if all segments have one length, a Triton
    kernel if they are short, and else one variable-length FlashAttention call. Elsewhere it is SDPA
    on padded segments. With a window, CUDA has a kernel for segments of one length, which have a
    row for every time; others use the reference.

    Args:
        q: (M, H, d), queries.
        k, v: (M, H_kv, d), keys and values; H is a multiple of H_kv.
        rows: the layout of M rows.
        window: a row sees rows that are less than this older than itself; None for all of them.
        time: (M,) int64, the age of rows, ascending inside a segment; with a window only.

    Returns:
        (M, H, d), in the dtype of `q`. Scores are scaled by d^-1/2.
    """
    if window is not None:
        assert time is not None
        return _windowed(q, k, v, rows, window, time)
    half = q.dtype in backend.HALF_DTYPES
    short = rows.max_seqlen <= MAX_SEGMENT_LENGTH and q.shape[2] in HEAD_DIMS
    if half and short and not rows.equal_lengths and backend.use_triton(q):
        return short_segment_attention(q, k, v, rows)
    if not (q.is_cuda and half):
        return segment_attention_reference(q, k, v, rows.cu_seqlens)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if rows.equal_lengths:  # a batch, for which SDPA has faster kernels
        q, k, v = (x.unflatten(0, (-1, rows.max_seqlen)).transpose(1, 2) for x in (q, k, v))
        batched = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return batched.transpose(1, 2).flatten(0, 1)
    length, cu = rows.max_seqlen, rows.cu_seqlens
    out = varlen_attn(q, k, v, cu, cu, length, length, **_CAUSAL)
    assert isinstance(out, Tensor)  # a tuple only if auxiliary outputs are requested
    return out


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, window: int, time: Tensor
) -> Tensor:
    fast = q.is_cuda and q.dtype in backend.HALF_DTYPES and "window_size" in _PARAMETERS
    if not (fast and rows.equal_lengths):
        return segment_attention_reference(q, k, v, rows.cu_seqlens, window, time)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    length, cu = rows.max_seqlen, rows.cu_seqlens
    out = varlen_attn(q, k, v, cu, cu, length, length, window_size=(window - 1, 0))
    assert isinstance(out, Tensor)  # a tuple only if auxiliary outputs are requested
    return out
