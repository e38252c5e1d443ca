"""What a linear layer with a block of its own for every row means."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN


def indexed_linear_reference(
    x: Tensor,
    weights: list[Tensor],
    blocks: Tensor,
    *,
    plus: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    activation: str | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Shapes as `indexed_linear`, block by block; rounds to x's dtype where a model would."""
    rows = x.repeat_interleave(blocks.shape[0] // x.shape[0], 0)
    h = rows if plus is None else rows + plus
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
    """y: (R, size), or (R, 2 size) with what multiplies the activations behind them."""
    first, *second = y.split(size, dim=-1)
    activated: Tensor = ACT2FN[name](first)
    return activated * second[0] if second else activated
