"""Causal softmax attention inside segments, by padding them to one length."""

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.kernels.rows import longest_segment, pad_segments, unpad_segments


def segment_attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """q: (M, h, d), k and v: (M, kv, d) -> (M, h, d).

    Padding stands after a segment's rows, where a causal mask already hides it.
    """
    length = longest_segment(cu_seqlens)
    # Half precision gains nothing here: CPUs have fast half matmuls but slow half attention.
    exact = torch.promote_types(q.dtype, torch.float32)
    query, key, value = (
        pad_segments(x.to(exact), cu_seqlens, length).transpose(1, 2) for x in (q, k, v)
    )
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return unpad_segments(out.transpose(1, 2), cu_seqlens, q.shape[0]).to(q.dtype)
