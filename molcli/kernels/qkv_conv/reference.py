"""Convolution, SiLU and unit length, one after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.kernels.short_conv import short_conv

EPS = 1e-6  # the shortest length that q and k are divided by


def qkv_conv_reference(
    x: Tensor, weight: Tensor, start: Tensor, index: Tensor, state: Tensor | None, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (M, 3 * h * head_dim), q, k and v side by side. weight: (M or 1, channels, W), each row's
    own; start, index, state: as for `short_conv`. Returns q, k and v, (M, h, head_dim) in x's
    dtype; q and k have unit length.
    """
    filtered = F.silu(short_conv(x, weight, start, index, state))
    q, k, v = filtered.unflatten(1, (3, -1, head_dim)).unbind(1)
    exact = torch.promote_types(x.dtype, torch.float32)
    q, k = (F.normalize(z.to(exact), dim=-1, eps=EPS) for z in (q, k))
    return q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)
