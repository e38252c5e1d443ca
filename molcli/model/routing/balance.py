"""Balance routed blocks: by a loss, or by a bias on the router's logits."""

import torch
from torch import Tensor


def block_weights(weights: Tensor, blocks: Tensor, num_blocks: int) -> Tensor:
    """Sum the routing weights of each block over tokens, deterministically (no atomic additions).

    Args:
        weights: (..., n, k), of the n unpadded tokens of a batch.
        blocks: (..., n, k) int64, distinct for each token.

    Returns:
        (..., num_blocks).
    """
    dense = weights.new_zeros(*weights.shape[:-1], num_blocks)
    return dense.scatter(-1, blocks, weights).sum(-2)


def cv_squared(weights: Tensor, blocks: Tensor, num_blocks: int) -> Tensor:
    """Compute each layer's balance loss: variance over squared mean of the blocks' routing weights.

    The gradient reaches the router through the weights; the choice of blocks has none.

    Args:
        weights: (..., n, k), n >= 1, without padding.
        blocks: (..., n, k) int64, distinct for each token.

    Returns:
        (...): 0 if all blocks receive the same, num_blocks - 1 if one receives everything.

    Source: arXiv 2605.09516.
    """
    loads = block_weights(weights, blocks, num_blocks)
    return loads.var(-1, correction=0) / loads.mean(-1).square()


def block_counts(blocks: Tensor, num_blocks: int) -> Tensor:
    """Count the tokens that visit each block.

    Args:
        blocks: (..., n, k) int64, distinct for each of the n unpadded tokens of a batch.

    Returns:
        (..., num_blocks) int64.
    """
    return block_weights(torch.ones_like(blocks), blocks, num_blocks)


def bias_step(loads: Tensor, rate: float) -> Tensor:
    """Compute the update of each block's bias: rate * sign(mean load - load).

    Args:
        loads: (..., num_blocks), tokens of a global batch by block.
        rate: size of the update.

    Returns:
        (..., num_blocks) float32.

    Source: arXiv 2408.15664.
    """
    loads = loads.float()
    return rate * (loads.mean(-1, keepdim=True) - loads).sign()
