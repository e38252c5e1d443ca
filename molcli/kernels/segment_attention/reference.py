"""Causal softmax attention inside segments in plain PyTorch, by padding segments to one length."""

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.kernels.segments import longest_segment, pad_segments, unpad_segments

# All segments are padded to one length up to this ratio of padded rows to rows. Beyond it they are
# grouped by length.
MAX_PADDED_RATIO = 2


def segment_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int | None = None,
    time: Tensor | None = None,
) -> Tensor:
    """Attend to the earlier rows of each row's own segment, and to the row itself.

    Args:
        q: (M, H, d), queries.
        k, v: (M, H_kv, d), keys and values; H is a multiple of H_kv.
        cu_seqlens: (num_segments + 1,), bounds of the segments.
        window, time: as for `segment_attention`.

    Returns:
        (M, H, d), in the dtype of `q`. Scores are scaled by d^-1/2.
    """
    length = longest_segment(cu_seqlens)
    if (len(cu_seqlens) - 1) * length <= MAX_PADDED_RATIO * len(q) or not len(q):
        return _padded(q, k, v, cu_seqlens, length, window, time)
    lengths = cu_seqlens.diff().long()
    # Segments of size i have more than 2^(i - 1) and at most 2^i rows.
    sizes = lengths.clamp(min=1).double().log2().ceil().long()
    size_of_row = sizes.repeat_interleave(lengths)
    places, outs = [], []
    for size in size_of_row.unique().tolist():
        own = (size_of_row == size).nonzero()[:, 0]
        own_lengths = lengths[(sizes == size) & (lengths > 0)]
        cu = F.pad(own_lengths.cumsum(0), (1, 0)).to(cu_seqlens.dtype)
        places.append(own)
        own_time = None if time is None else time[own]
        outs.append(_padded(q[own], k[own], v[own], cu, int(own_lengths.max()), window, own_time))
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
    """Padding follows a segment's rows, so the causal mask hides it."""
    # Half precision gains nothing here: CPUs have fast half matmuls but slow half attention.
    exact = torch.promote_types(q.dtype, torch.float32)
    if q.is_cuda and q.shape[1] > k.shape[1]:
        # On CUDA no float32 kernel with grouped key-value heads avoids storing the scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    query, key, value = (
        pad_segments(x.to(exact), cu_seqlens, length).transpose(1, 2) for x in (q, k, v)
    )
    mask = None
    if window is not None and time is not None:
        padded = pad_segments(time, cu_seqlens, length)
        recent = padded[:, :, None] - padded[:, None, :] < window
        # Padding must see something, or its output, which is dropped, would be NaN.
        mask = (recent.tril() | torch.eye(length, dtype=torch.bool, device=q.device))[:, None]
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
    return unpad_segments(out.transpose(1, 2), cu_seqlens, q.shape[0]).to(q.dtype)
