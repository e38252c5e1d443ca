"""Causal depthwise convolution inside segments, SiLU and unit length, one after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(
    x: Tensor, weight: Tensor, start: Tensor, index: Tensor, state: Tensor | None
) -> Tensor:
    """y[row] = sum_j weight[row, :, W - 1 - j] * x[row - j], inside the row's segment.

    x: (M, C). weight: (M or 1, C, W), each row's own. start: (M,) the row's place in `state`.
    index: (M,) rows of its segment before it. state: (places, C, W - 1), the inputs that came
    before the segment, oldest first; None stands for zeros. Returns (M, C).
    """
    width = weight.shape[-1]
    out = x * weight[..., width - 1]
    for back in range(1, width):
        inside = (index >= back)[:, None]
        earlier = torch.where(inside, F.pad(x, (0, 0, back, 0))[: x.shape[0]], 0.0)
        if state is not None:
            column = (width - 1 + index - back).clamp(0, width - 2)
            earlier = torch.where(inside, earlier, state[start, :, column].to(x.dtype))
        out = out + earlier * weight[..., width - 1 - back]
    return out


def short_conv_state(x: Tensor, cu_seqlens: Tensor, state: Tensor) -> Tensor:
    """The last W - 1 inputs of every segment, oldest first, for the next call.

    x: (M, C) rows. state: (segments, C, W - 1), the inputs before. Returns (segments, C, W - 1).
    """
    kept = state.shape[-1]
    start, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    row = end - kept + torch.arange(kept, device=x.device)  # (segments, W - 1)
    column = (kept + row - start).clamp(0, kept - 1)
    old = state.gather(2, column[:, None, :].expand_as(state))
    new = x[row.clamp(0, max(x.shape[0] - 1, 0))].transpose(1, 2).to(state.dtype)
    return torch.where((row >= start)[:, None, :], new, old)


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
