"""The load-balance loss of Mixture of Layers."""

from torch import Tensor


def block_weights(weights: Tensor, blocks: Tensor, num_blocks: int) -> Tensor:
    """Routing weight that each block received, summed over tokens: (num_blocks,).

    weights: (n, k), blocks: (n, k) int64, of the n unpadded tokens of a batch.
    """
    return weights.new_zeros(num_blocks).index_add(0, blocks.flatten(), weights.flatten())


def cv_squared(weights: Tensor, blocks: Tensor, num_blocks: int) -> Tensor:
    """One layer's loss: population variance over squared mean of its blocks' routing weight.

    weights: (n, k), blocks: (n, k) int64, n >= 1, padding left out -> scalar, 0 when all blocks
    receive the same, num_blocks - 1 when one receives everything. The gradient reaches the router
    through the weights; the choice of blocks has none. Source: arXiv 2605.09516.
    """
    loads = block_weights(weights, blocks, num_blocks)
    return loads.var(correction=0) / loads.mean().square()


def block_counts(blocks: Tensor, num_blocks: int) -> Tensor:
    """Tokens that visited each block: (num_blocks,) int64. blocks: (n, k), padding left out."""
    # Not bincount, for which the host would wait.
    ones = blocks.new_ones(blocks.numel())
    return blocks.new_zeros(num_blocks).index_add(0, blocks.flatten(), ones)


def bias_step(loads: Tensor, rate: float) -> Tensor:
    """What loss-free balancing adds to the bias of each block: rate * sign(mean load - load).

    loads: (num_blocks,) of a global batch -> (num_blocks,) float32. Source: arXiv 2408.15664.
    """
    loads = loads.float()
    return rate * (loads.mean() - loads).sign()
