"""The balance of a Mixture of Layers: as a loss, and as a bias without one."""

import torch
from torch import Tensor


def block_weights(weights: Tensor, blocks: Tensor, num_blocks: int) -> Tensor:
    """Routing weight that each block received, summed over tokens: (..., num_blocks).

    weights: (..., n, k), blocks: (..., n, k) int64, distinct blocks of the n unpadded tokens of a
    batch. No two summands go to one place at once: the same bits in every run.
    """
    dense = weights.new_zeros(*weights.shape[:-1], num_blocks)
    return dense.scatter(-1, blocks, weights).sum(-2)


def cv_squared(weights: Tensor, blocks: Tensor, num_blocks: int) -> Tensor:
    """Each layer's loss: population variance over squared mean of its blocks' routing weight.

    weights: (..., n, k), blocks: (..., n, k) int64, n >= 1, padding left out -> (...), 0 when all
    blocks receive the same, num_blocks - 1 when one receives everything. The gradient reaches the
    router through the weights; the choice of blocks has none. Source: arXiv 2605.09516.
    """
    loads = block_weights(weights, blocks, num_blocks)
    return loads.var(-1, correction=0) / loads.mean(-1).square()


def block_counts(blocks: Tensor, num_blocks: int) -> Tensor:
    """Tokens that visited each block: (..., num_blocks) int64.

    blocks: (..., n, k) int64, distinct blocks of the n unpadded tokens of a batch.
    """
    return block_weights(torch.ones_like(blocks), blocks, num_blocks)


def bias_step(loads: Tensor, rate: float) -> Tensor:
    """What loss-free balancing adds to each block's bias: rate * sign(mean load - load).

    loads: (..., num_blocks) of a global batch -> the same shape, float32. Source: arXiv 2408.15664.
    """
    loads = loads.float()
    return rate * (loads.mean(-1, keepdim=True) - loads).sign()
