"""Softmax attention of one new token a sequence, over a cache of fixed size that it joins."""

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.step_attention.reference import append_reference, attend_reference

__all__ = ["append", "append_reference", "attend", "attend_reference"]


@torch.library.custom_op("molcli::step_append", mutates_args=("keys", "values", "owners"))
def append(
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
    """Biases, norms and rotation of the projections q, k and v; k and v go into the cache.

    projected: (R, (heads + 2 kv) D), row token * slots + slot. biases: none, or of q, k and v,
    (blocks, out); norms: none, or of q and k, (blocks, D). cos, sin: (B, r) for the first r
    channels. keys, values: (B, L, slots, kv, D) and owners: (B, L, slots) int32, each entry's
    block, are written at time `filled` (1,); owners are -1 where a sequence is not `active` (B,).
    blocks: (R,) int64. Returns q, (R, heads, D).
    """
    arguments = (projected, biases, norms, cos, sin, keys, values, owners, filled, blocks, active)
    if backend.on_triton(projected):
        from molcli.kernels.step_attention.triton_kernels import launch_append

        return launch_append(*arguments, heads, eps)
    return append_reference(*arguments, heads, eps)


@append.register_fake
def _(
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
    return projected.new_empty(projected.shape[0], heads, keys.shape[-1])


@torch.library.custom_op("molcli::step_attend", mutates_args=())
def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    owners: Tensor,
    filled: Tensor,
    blocks: Tensor,
    num_blocks: int,
    window: int = 0,
) -> Tensor:
    """q: (R, heads, D) -> (R, heads * D). A row sees the entries of its own sequence and block up
    to time `filled`, and no later ones are read; scores are scaled by D^-1/2. The cache's shapes
    are those of `append`; num_blocks: how many blocks share it. window: how many of the latest
    times a row sees; 0 for all of them.
    """
    if backend.on_triton(q):
        from molcli.kernels.step_attention.triton_kernels import launch_attend

        return launch_attend(q, keys, values, owners, filled, blocks, num_blocks, window)
    return attend_reference(q, keys, values, owners, filled, blocks, window)


@attend.register_fake
def _(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    owners: Tensor,
    filled: Tensor,
    blocks: Tensor,
    num_blocks: int,
    window: int = 0,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
