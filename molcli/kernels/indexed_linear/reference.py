"""Decoding's linear layers in plain PyTorch, block by block."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN


def indexed_linear_reference(
    x: Tensor,
    weights: list[Tensor],
    blocks: Tensor,
    *,
    delta: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    activation: str | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return residual + act(W[block] h + bias[block]), with h = RMSNorm(x + delta).

    Rounds to the dtype of `x` at every step that an eager model would round at.

    Args:
        blocks: (R,) int64, each row's block.
        Others: as for `indexed_linear`.

    Returns:
        (R, out), in the dtype of `x`.
    """
    rows = x.repeat_interleave(blocks.shape[0] // x.shape[0], 0)
    h = rows if delta is None else rows + delta
    exact = torch.promote_types(x.dtype, torch.float32)
    if norm is not None:
        h = h.to(exact)
        h = norm[blocks] * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    y = x.new_empty(blocks.shape[0], sum(w.shape[1] for w in weights))
    for block in blocks.unique().tolist():
        own = blocks == block
        y[own] = torch.cat([F.linear(h[own], w[block]) for w in weights], dim=-1)
    if bias is not None:
        y = y + bias[blocks].to(y.dtype)
    if activation is not None:
        y = activate(y, activation, weights[0].shape[1])
    return y if residual is None else residual + y


def activate(y: Tensor, name: str, size: int) -> Tensor:
    """Apply an activation, gated or not.

    Args:
        y: (R, size), or (R, 2 size) of a gated layer: the gate first, then what it multiplies.
        name: a name in transformers' ACT2FN.
        size: width of the output.

    Returns:
        (R, size).
    """
    first, *second = y.split(size, dim=-1)
    activated: Tensor = ACT2FN[name](first)
    return activated * second[0] if second else activated
