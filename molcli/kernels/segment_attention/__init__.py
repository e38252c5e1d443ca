"""Causal softmax attention in which a row sees its own segment alone."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from molcli.kernels import backend
from molcli.kernels.packed_rows import PackedRows
from molcli.kernels.segment_attention.packed import LONGEST, WIDTHS, packed_attention
from molcli.kernels.segment_attention.reference import segment_attention_reference

__all__ = ["segment_attention", "segment_attention_reference"]

# torch 2.10 says `is_causal=True` where later releases take a window.
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
    """q: (M, h, d), k and v: (M, kv, d), scaled by d^-1/2 -> (M, h, d).

    window: a row sees the rows of its segment that are less than this older than itself, by `time`
    (M,), which ascends inside a segment. None for all of them. With a window, only segments of
    which every row is there (`rows.even`) have a fast kernel on CUDA; others use the reference.

    On CUDA in half precision SDPA where segments are equally long, a Triton kernel where they are
    short, else one variable-length FlashAttention call; elsewhere SDPA on padded segments.
    """
    if window is not None:
        assert time is not None
        return _windowed(q, k, v, rows, window, time)
    half = q.dtype in (torch.bfloat16, torch.float16)
    short = rows.max_seqlen <= LONGEST and q.shape[2] in WIDTHS
    if half and short and not rows.even and backend.on_triton(q):
        return packed_attention(q, k, v, rows)
    if not (q.is_cuda and half):
        return segment_attention_reference(q, k, v, rows.cu_seqlens)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if rows.even:  # then a batch, which SDPA has quicker kernels for
        q, k, v = (x.unflatten(0, (-1, rows.max_seqlen)).transpose(1, 2) for x in (q, k, v))
        batched = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return batched.transpose(1, 2).flatten(0, 1)
    length, cu = rows.max_seqlen, rows.cu_seqlens
    out = varlen_attn(q, k, v, cu, cu, length, length, **_CAUSAL)
    assert isinstance(out, Tensor)  # a pair only where auxiliary outputs are asked for
    return out


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, window: int, time: Tensor
) -> Tensor:
    half = q.dtype in (torch.bfloat16, torch.float16)
    if not (q.is_cuda and half and rows.even and "window_size" in _PARAMETERS):
        return segment_attention_reference(q, k, v, rows.cu_seqlens, window, time)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    length, cu = rows.max_seqlen, rows.cu_seqlens
    out = varlen_attn(q, k, v, cu, cu, length, length, window_size=(window - 1, 0))
    assert isinstance(out, Tensor)
    return out
