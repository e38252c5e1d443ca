"""Causal depthwise convolution inside segments, SiLU and unit length, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # q and k are divided by their length, or by this if they are shorter


def qkv_conv_reference(
    x: Tensor,
    weight: Tensor,
    segment: Tensor,
    index: Tensor,
    state: Tensor | None,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve q, k and v, apply SiLU, and scale q and k to unit length.

    Args:
        x: (M, 3 * H * head_dim), q, k and v of each row, concatenated.
        weight: (M or 1, 3 * H * head_dim, W), each row's filters, oldest input first.
        segment, index, state: as for `short_conv`.
        head_dim: channels of a head.

    Returns:
        q, k and v, (M, H, head_dim) each, in the dtype of `x`.
    """
    filtered = F.silu(short_conv(x, weight, segment, index, state))
    q, k, v = filtered.unflatten(1, (3, -1, head_dim)).unbind(1)
    exact = torch.promote_types(x.dtype, torch.float32)
    q, k = (F.normalize(z.to(exact), dim=-1, eps=EPS) for z in (q, k))
    return q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)


def short_conv(
    x: Tensor, weight: Tensor, segment: Tensor, index: Tensor, state: Tensor | None
) -> Tensor:
    """Convolve each channel causally inside its segment.

    y[row] = sum over j < W of weight[row, :, W - 1 - j] * x[row - j].

    Args:
        x: (M, C), a value per row.
        weight: (M or 1, C, W), each row's filters, oldest input first.
        segment: (M,), each row's index into `state`.
        index: (M,), how many rows of its own segment precede each row.
        state: (num_states, C, W - 1), the inputs before each segment, oldest first; None for zeros.

    Returns:
        (M, C).
    """
    width = weight.shape[-1]
    out = x * weight[..., width - 1]
    for back in range(1, width):
        inside = (index >= back)[:, None]
        earlier = torch.where(inside, F.pad(x, (0, 0, back, 0))[: x.shape[0]], 0.0)
        if state is not None:
            column = (width - 1 + index - back).clamp(0, width - 2)
            earlier = torch.where(inside, earlier, state[segment, :, column].to(x.dtype))
        out = out + earlier * weight[..., width - 1 - back]
    return out


def short_conv_state(x: Tensor, cu_seqlens: Tensor, state: Tensor) -> Tensor:
    """Return the last W - 1 inputs of every segment, for the next call of `short_conv`.

    Args:
        x: (M, C), a value per row.
        cu_seqlens: (num_segments + 1,), bounds of the segments.
        state: (num_segments, C, W - 1), the inputs before each segment, oldest first.

    Returns:
        (num_segments, C, W - 1), in the dtype of `state`.
    """
    kept = state.shape[-1]
    start, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    row = end - kept + torch.arange(kept, device=x.device)  # (num_segments, W - 1)
    column = (kept + row - start).clamp(0, kept - 1)
    old = state.gather(2, column[:, None, :].expand_as(state))
    new = x[row.clamp(0, max(x.shape[0] - 1, 0))].transpose(1, 2).to(state.dtype)
    return torch.where((row >= start)[:, None, :], new, old)
