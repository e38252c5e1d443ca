"""One decoding step of Gated DeltaNet, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_delta_step_reference(
    projected: Tensor,
    convs: list[Tensor],
    a_log: Tensor,
    dt_bias: Tensor,
    o_norm: Tensor,
    conv_state: Tensor,
    state: Tensor,
    blocks: Tensor,
    active: Tensor,
    eps: float,
) -> Tensor:
    """Run a Gated DeltaNet mixer on one new token per row.

    Arguments and returns are those of `gated_delta_step`. Rounds to the inputs' dtype at every step
    that an eager model would round at.
    """
    heads, dim = state.shape[2], state.shape[-1]
    inner, exact = heads * dim, state.dtype
    mixed, gate, a, b = projected.split([3 * inner, inner, heads, heads], dim=-1)
    sequence = torch.arange(blocks.shape[0], device=blocks.device) // (
        blocks.shape[0] // state.shape[0]
    )
    live = active[sequence].bool()
    before = conv_state[sequence, blocks]
    window = torch.cat([before, mixed[..., None].to(before.dtype)], dim=-1)
    weight = torch.cat(convs, dim=1)[blocks]
    filtered = (window.to(mixed.dtype) * weight).sum(-1)
    q, k, v = F.silu(filtered).unflatten(1, (3, heads, dim)).unbind(1)
    q, k = (F.normalize(x.to(exact), dim=-1, eps=1e-6).to(v.dtype).to(exact) for x in (q, k))
    decay = -a_log[blocks].to(exact).exp() * F.softplus(a.to(exact) + dt_bias[blocks].to(exact))
    old = state[sequence, blocks]
    new = old * decay[..., None, None].exp()
    error = v.to(exact) - torch.einsum("rhk,rhkv->rhv", k, new)
    new = new + torch.einsum("rhk,rhv->rhkv", k, b.to(exact).sigmoid()[..., None] * error)
    out = torch.einsum("rhk,rhkv->rhv", q, new) * dim**-0.5
    # where() instead of a masked index, whose size would depend on the mask.
    conv_state[sequence, blocks] = torch.where(live[:, None, None], window[..., 1:], before)
    state[sequence, blocks] = torch.where(live[:, None, None, None], new, old)
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps)
    gated = F.silu(gate).unflatten(1, (heads, dim))
    return (out.to(gate.dtype) * o_norm[blocks][:, None].to(gate.dtype) * gated).flatten(1)
