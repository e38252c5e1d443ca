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
_CAUSAL: dict[str, Any] = (
    {"window_size": (-1, 0)}
    if "window_size" in inspect.signature(varlen_attn).parameters
    else {"is_causal": True}
)


def segment_attention(q: Tensor, k: Tensor, v: Tensor, rows: PackedRows) -> Tensor:
    """Attend to the earlier rows of each row's own segment, and to the row itself.

    On CUDA in half precision this is SDPA on a batch if all segments have one length, a Triton
    kernel if they are short, and else one variable-length FlashAttention call. Elsewhere it is SDPA
    on padded segments.

    Args:
        q: (M, H, d), queries.
        k, v: (M, H_kv, d), keys and values; H is a multiple of H_kv.
        rows: the layout of M rows.

    Returns:
        (M, H, d), in the dtype of `q`. Scores are scaled by d^-1/2.
    """
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
