"""Second moments, accumulated in float64."""

from collections.abc import Iterable

import torch
from torch import Tensor

CHUNK_ROWS = 8192
Sample = tuple[Tensor, Tensor, Tensor]
"""features (M, p), wanted (M, q), rows sorted by block; (B,) ends of the blocks' rows."""


def cross_moment(x: Tensor, y: Tensor) -> Tensor:
    """Sum over rows of x y^T. x: (M, p), y: (M, q) -> (p, q) float64.

    Products of a few thousand rows are taken in the inputs' dtype and summed in float64: the
    speed of the one with, to the last digits that matter, the accuracy of the other.
    """
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for a, b in zip(x.split(CHUNK_ROWS), y.split(CHUNK_ROWS), strict=True):
        total += a.mT @ b
    return total


def second_moment(x: Tensor) -> Tensor:
    """Sum over rows of x x^T. x: (M, d) -> (d, d) float64."""
    return cross_moment(x, x)


def add_cross_moments(total: Tensor, x: Tensor, y: Tensor, offsets: Tensor) -> None:
    """Adds each block's cross moment to its entry of `total` (B, p, q) float64, in place.

    x: (M, p), y: (M, q), rows sorted by block; offsets: (B,) ends of the blocks' rows.
    """
    ends = offsets.tolist()
    for own, begin, end in zip(total, [0, *ends[:-1]], ends, strict=True):
        for a, b in zip(
            x[begin:end].split(CHUNK_ROWS), y[begin:end].split(CHUNK_ROWS), strict=True
        ):
            own += a.mT @ b


def shrink_to_pooled(own: Tensor, shrinkage: float) -> Tensor:
    """own: (B, p, q), a moment per block -> (1 - shrinkage) own + shrinkage the sum of all, in
    place.

    With shrinkage, a block that saw few tokens is fitted like its family instead of not at all.
    """
    if shrinkage:
        everything = own.sum(0)
        own.mul_(1 - shrinkage).add_(everything, alpha=shrinkage)
    return own


def regression_moments(samples: Iterable[Sample], shrinkage: float) -> tuple[Tensor, Tensor]:
    """The second moment of the features and the cross moment of both, `shrink_to_pooled`.

    samples: of one text, a chunk at a time, at least one. Returns (B, p, p), (B, p, q) float64.
    """
    sums: tuple[Tensor, ...] = ()
    for features, wanted, offsets in samples:
        pairs = (features, features), (features, wanted)
        if not sums:
            sums = tuple(
                torch.zeros(
                    len(offsets), x.shape[1], y.shape[1], dtype=torch.float64, device=x.device
                )
                for x, y in pairs
            )
        for total, (x, y) in zip(sums, pairs, strict=True):
            add_cross_moments(total, x, y, offsets)
    gram, cross = (shrink_to_pooled(total, shrinkage) for total in sums)
    return gram, cross


def unit_rms(x: Tensor) -> Tensor:
    """x: (..., d) scaled to unit mean square, like RMSNorm without a weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
