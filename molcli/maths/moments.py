"""Second moments, accumulated in float64."""

import torch
from torch import Tensor

CHUNK_ROWS = 8192


def cross_moment(x: Tensor, y: Tensor) -> Tensor:
    """Sum over rows of x y^T. x: (M, p), y: (M, q) -> (p, q) float64.

    Products of a few thousand rows are taken in the inputs' dtype and summed in float64: the
    speed of the one with, to the last digits that matter, the accuracy of the other.
    """
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for a, b in zip(x.split(CHUNK_ROWS), y.split(CHUNK_ROWS), strict=True):
        total += (a.mT @ b).double()
    return total


def second_moment(x: Tensor) -> Tensor:
    """Sum over rows of x x^T. x: (M, d) -> (d, d) float64."""
    return cross_moment(x, x)


def grouped_cross_moment(x: Tensor, y: Tensor, offsets: Tensor, shrinkage: float) -> Tensor:
    """One cross moment per block, drawn towards the sum of all.

    x: (M, p), y: (M, q), rows sorted by block; offsets: (B,) ends of the blocks' rows.
    Returns (B, p, q) float64: (1 - shrinkage) own + shrinkage all. With shrinkage, a block that
    saw few tokens is fitted like its family instead of not at all.
    """
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    own = torch.stack([cross_moment(x[a:b], y[a:b]) for a, b in zip(starts, ends, strict=True)])
    return (1 - shrinkage) * own + shrinkage * own.sum(0)


def unit_rms(x: Tensor) -> Tensor:
    """x: (..., d) scaled to unit mean square, like RMSNorm without a weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
