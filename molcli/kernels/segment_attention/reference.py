"""Causal softmax attention inside segments, by padding them to one length."""

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.kernels.packed_rows import longest_segment, pad_segments, unpad_segments

PADDED = 2  # times as many rows as there are may be padding; beyond, segments go by their length


def segment_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int | None = None,
    time: Tensor | None = None,
) -> Tensor:
    """q: (M, h, d), k and v: (M, kv, d), time: (M,) -> (M, h, d)."""
    length = longest_segment(cu_seqlens)
    if (len(cu_seqlens) - 1) * length <= PADDED * len(q):
        return _padded(q, k, v, cu_seqlens, length, window, time)
    lengths = cu_seqlens.diff().long()
    # Segments of more than half and at most all of 1, 2, 4, ... rows.
    sizes = lengths.clamp(min=1).double().log2().ceil().long()
    size_of_row = sizes.repeat_interleave(lengths)
    places, outs = [], []
    for size in size_of_row.unique().tolist():
        own = (size_of_row == size).nonzero()[:, 0]
        chosen = lengths[(sizes == size) & (lengths > 0)]
        cu = F.pad(chosen.cumsum(0), (1, 0)).to(cu_seqlens.dtype)
        places.append(own)
        own_time = None if time is None else time[own]
        outs.append(_padded(q[own], k[own], v[own], cu, int(chosen.max()), window, own_time))
    return torch.cat(outs)[torch.cat(places).argsort()]


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    length: int,
    window: int | None,
    time: Tensor | None,
) -> Tensor:
    """Padding stands after a segment's rows, where a causal mask already hides it."""
    # Half precision gains nothing here: CPUs have fast half matmuls but slow half attention.
    exact = torch.promote_types(q.dtype, torch.float32)
    if q.is_cuda and q.shape[1] > k.shape[1]:
        # With shared key-value heads there is no kernel for float32 there that keeps no scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    query, key, value = (
        pad_segments(x.to(exact), cu_seqlens, length).transpose(1, 2) for x in (q, k, v)
    )
    mask = None
    if window is not None and time is not None:
        padded = pad_segments(time, cu_seqlens, length)
        recent = padded[:, :, None] - padded[:, None, :] < window
        # Padding may see anything, but must see something: its output is dropped.
        mask = (recent.tril() | torch.eye(length, dtype=torch.bool, device=q.device))[:, None]
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
    return unpad_segments(out.transpose(1, 2), cu_seqlens, q.shape[0]).to(q.dtype)
