"""Softmax attention of one decoding step over a cache of fixed size, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def step_append_reference(
    projected: Tensor,
    biases: list[Tensor],
    norms: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    cache_blocks: Tensor,
    filled: Tensor,
    blocks: Tensor,
    active: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    """Add biases, normalise and rotate q and k, and write k and v to the cache.

    Arguments and returns are those of `step_append`. Rounds to the inputs' dtype at every step that
    an eager model would round at.
    """
    batch, _, slots, kv, dim = keys.shape
    rows = blocks.shape[0]
    token = torch.arange(rows, device=blocks.device) // slots
    q, k, v = projected.split([num_heads * dim, kv * dim, kv * dim], dim=-1)
    if biases:
        q, k, v = (x + b[blocks].to(x.dtype) for x, b in zip((q, k, v), biases, strict=True))
    q, k, v = (x.unflatten(1, (-1, dim)) for x in (q, k, v))
    exact = torch.promote_types(q.dtype, torch.float32)
    if norms:
        wide = [x.to(exact) for x in (q, k)]
        wide = [x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) for x in wide]
        q, k = (w[blocks][:, None] * x.to(v.dtype) for x, w in zip(wide, norms, strict=True))
    rotary_dim = cos.shape[-1]
    c, s = (x[token][:, None].to(v.dtype) for x in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        first, second = x[..., :rotary_dim].chunk(2, dim=-1)
        rotated = x[..., :rotary_dim] * c + torch.cat([-second, first], dim=-1) * s
        return torch.cat([rotated, x[..., rotary_dim:]], dim=-1)

    new_blocks = torch.where(active.bool()[:, None], blocks.view(batch, slots), -1)
    time = filled.long()
    for cache, new in ((keys, rotate(k)), (values, v), (cache_blocks, new_blocks)):
        new = new.to(cache.dtype).reshape(batch, 1, *cache.shape[2:])
        cache.index_copy_(1, time, new)
    return rotate(q).contiguous()


def step_attend_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    cache_blocks: Tensor,
    filled: Tensor,
    blocks: Tensor,
    window: int = 0,
) -> Tensor:
    """Attend to the cache. Arguments and returns are those of `step_attend`."""
    batch, length, slots, _, _ = keys.shape
    rows, heads, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    time = torch.arange(length, device=q.device)
    visible = time <= filled  # (length,)
    if window:
        visible = visible & (time > filled - window)
    same = blocks.view(batch, slots, 1, 1) == cache_blocks[:, None]  # (batch, slots, length, slots)
    mask = (same & visible[:, None]).flatten(2)[:, None]
    # A row that sees no entry gets zeros instead of NaN.
    blind = ~mask.any(-1, keepdim=True)
    query = q.view(batch, slots, heads, -1).transpose(1, 2).to(exact)
    key, value = (x.flatten(1, 2).transpose(1, 2).to(exact) for x in (keys, values))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask | blind, enable_gqa=True
    ).masked_fill(blind, 0.0)
    return out.transpose(1, 2).reshape(rows, -1).to(q.dtype)
