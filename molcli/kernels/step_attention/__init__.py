"""Softmax attention of one decoding step, over a cache of fixed size.

`step_append` writes the new tokens' keys and values to the cache, `step_attend` reads them all.
"""

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.step_attention.reference import step_append_reference, step_attend_reference

__all__ = ["step_append", "step_append_reference", "step_attend", "step_attend_reference"]


@torch.library.custom_op("molcli::step_append", mutates_args=("keys", "values", "cache_blocks"))
def step_append(
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

    Args:
        projected: (R, (H + 2 H_kv) D), the projections q, k and v, concatenated; row token * slots
            + slot.
        biases: those of q, k and v, (num_blocks, out) each, or an empty list.
        norms: RMSNorm weights of q and k, (num_blocks, D) each, or an empty list.
        cos, sin: (B, r), the rotary embedding of the first r channels of a head.
        keys, values: (B, L, slots, H_kv, D), the cache. Updated in place at time `filled`.
        cache_blocks: (B, L, slots) int32, the block of each entry of the cache. Updated in place:
            -1 for a sequence that is not active, so that no row sees the entry.
        filled: (1,) int32, how many of L times of the cache are filled.
        blocks: (R,) int64, each row's block.
        active: (B,) int32, 0 for a sequence whose new token is padding.
        num_heads: number of query heads H.
        eps: added to the mean square in the RMSNorm.

    Returns:
        q, (R, H, D).
    """
    cache = (keys, values, cache_blocks, filled)
    arguments = (projected, biases, norms, cos, sin, *cache, blocks, active, num_heads, eps)
    if backend.use_triton(projected):
        from molcli.kernels.step_attention.triton_kernels import launch_append

        return launch_append(*arguments)
    return step_append_reference(*arguments)


@step_append.register_fake
def _(
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
    return projected.new_empty(projected.shape[0], num_heads, keys.shape[-1])


@torch.library.custom_op("molcli::step_attend", mutates_args=())
def step_attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    cache_blocks: Tensor,
    filled: Tensor,
    blocks: Tensor,
    num_blocks: int,
    window: int = 0,
) -> Tensor:
    """Attend to the cache's entries of each row's own sequence and block.

    Entries up to time `filled`, which `step_append` wrote, are visible; later ones are never read.

    Args:
        q: (R, H, D), queries.
        keys, values, cache_blocks, filled, blocks: as for `step_append`.
        num_blocks: how many blocks write to this cache.
        window: how many of the latest times a row sees; 0 for all of them.

    Returns:
        (R, H * D), zeros for a row that sees no entry; a row whose own new token is padding may get
        zeros too. Scores are scaled by D^-1/2.
    """
    if backend.use_triton(q):
        from molcli.kernels.step_attention.triton_kernels import launch_attend

        return launch_attend(q, keys, values, cache_blocks, filled, blocks, num_blocks, window)
    return step_attend_reference(q, keys, values, cache_blocks, filled, blocks, window)


@step_attend.register_fake
def _(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    cache_blocks: Tensor,
    filled: Tensor,
    blocks: Tensor,
    num_blocks: int,
    window: int = 0,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
