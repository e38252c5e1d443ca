"""Second moments and cross moments, accumulated in float64."""

from collections.abc import Iterable

import torch
from torch import Tensor

CHUNK_ROWS = 8192  # rows that are multiplied in the inputs' dtype before they are summed in float64
Sample = tuple[Tensor, Tensor, Tensor]
"""Rows of a regression, sorted by block: features (M, p), targets (M, q), and the end of each
block's rows, (B,)."""


def cross_moment(x: Tensor, y: Tensor) -> Tensor:
    """Sum x y^T over rows.

    Products of up to CHUNK_ROWS rows are computed in the inputs' dtype, for speed, and summed in
    float64, for accuracy.

    Args:
        x: (M, p).
        y: (M, q).

    Returns:
        (p, q) float64.
    """
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for a, b in zip(x.split(CHUNK_ROWS), y.split(CHUNK_ROWS), strict=True):
        total += a.mT @ b
    return total


def second_moment(x: Tensor) -> Tensor:
    """Sum x x^T over the rows of x, (M, d). Returns (d, d) float64."""
    return cross_moment(x, x)


def add_cross_moments(total: Tensor, x: Tensor, y: Tensor, offsets: Tensor) -> None:
    """Add each block's cross moment to its entry of `total`, in place.

    Args:
        total: (B, p, q) float64.
        x: (M, p), rows sorted by block.
        y: (M, q), rows sorted by block.
        offsets: (B,) int, the end of each block's rows.
    """
    ends = offsets.tolist()
    for own, begin, end in zip(total, [0, *ends[:-1]], ends, strict=True):
        for a, b in zip(
            x[begin:end].split(CHUNK_ROWS), y[begin:end].split(CHUNK_ROWS), strict=True
        ):
            own += a.mT @ b


def shrink_to_pooled(own: Tensor, shrinkage: float) -> Tensor:
    """Mix each block's moment with the sum over all blocks, in place.

    With shrinkage, a block that saw few tokens is fitted to its family's tokens.

    Args:
        own: (B, p, q), a moment per block; overwritten.
        shrinkage: 0 to 1.

    Returns:
        (1 - shrinkage) * own + shrinkage * own.sum(0), in the memory of `own`.
    """
    if shrinkage:
        pooled = own.sum(0)
        own.mul_(1 - shrinkage).add_(pooled, alpha=shrinkage)
    return own


def regression_moments(samples: Iterable[Sample], shrinkage: float) -> tuple[Tensor, Tensor]:
    """Accumulate the moments of a regression for each block, then `shrink_to_pooled`.

    Args:
        samples: chunks of one text's rows, at least one.
        shrinkage: 0 to 1.

    Returns:
        The features' second moments, (B, p, p), and the cross moments of features and targets,
        (B, p, q), both float64.
    """
    sums: tuple[Tensor, ...] = ()
    for features, targets, offsets in samples:
        pairs = (features, features), (features, targets)
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
    """Scale (..., d) vectors to unit mean square, like RMSNorm without a weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
