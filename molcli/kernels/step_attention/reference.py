"""Softmax attention of one new token a sequence over a cache of fixed size, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def append_reference(
    projected: Tensor,
    biases: list[Tensor],
    norms: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    owners: Tensor,
    filled: Tensor,
    blocks: Tensor,
    active: Tensor,
    heads: int,
    eps: float,
) -> Tensor:
    """Shapes as `append`; rounds to the inputs' dtype where a model would."""
    batch, _, slots, kv, dim = keys.shape
    rows = blocks.shape[0]
    token = torch.arange(rows, device=blocks.device) // slots
    q, k, v = projected.split([heads * dim, kv * dim, kv * dim], dim=-1)
    if biases:
        q, k, v = (x + b[blocks].to(x.dtype) for x, b in zip((q, k, v), biases, strict=True))
    q, k, v = (x.unflatten(1, (-1, dim)) for x in (q, k, v))
    exact = torch.promote_types(q.dtype, torch.float32)
    if norms:
        wide = [x.to(exact) for x in (q, k)]
        wide = [x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) for x in wide]
        q, k = (w[blocks][:, None] * x.to(v.dtype) for x, w in zip(wide, norms, strict=True))
    turn = cos.shape[-1]
    c, s = (x[token][:, None].to(v.dtype) for x in (cos, sin))

    def rotated(x: Tensor) -> Tensor:
        first, second = x[..., :turn].chunk(2, dim=-1)
        turned = x[..., :turn] * c + torch.cat([-second, first], dim=-1) * s
        return torch.cat([turned, x[..., turn:]], dim=-1)

    owner = torch.where(active.bool()[:, None], blocks.view(batch, slots), -1)
    place = filled.long()
    for cache, new in ((keys, rotated(k)), (values, v), (owners, owner)):
        new = new.to(cache.dtype).reshape(batch, 1, *cache.shape[2:])
        cache.index_copy_(1, place, new)
    return rotated(q).contiguous()


def attend_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    owners: Tensor,
    filled: Tensor,
    blocks: Tensor,
    window: int = 0,
) -> Tensor:
    """Shapes as `attend`."""
    batch, length, slots, _, _ = keys.shape
    rows, heads, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    time = torch.arange(length, device=q.device)
    visible = time <= filled  # (length,)
    if window:
        visible = visible & (time > filled - window)
    same = blocks.view(batch, slots, 1, 1) == owners[:, None]  # (batch, slots, length, slots)
    mask = (same & visible[:, None]).flatten(2)[:, None]
    # A row that sees nothing reads zeros, not NaN.
    blind = ~mask.any(-1, keepdim=True)
    query = q.view(batch, slots, heads, -1).transpose(1, 2).to(exact)
    key, value = (x.flatten(1, 2).transpose(1, 2).to(exact) for x in (keys, values))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask | blind, enable_gqa=True
    ).masked_fill(blind, 0.0)
    return out.transpose(1, 2).reshape(rows, -1).to(q.dtype)
