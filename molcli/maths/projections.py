"""Bases for baselines: what truncation alone would keep."""

import torch
from torch import Tensor


def leading_directions(gram: Tensor, rank: int) -> tuple[Tensor, float]:
    """The `rank` directions that hold most of a second moment, and the share they hold.

    gram: (d, d) float64, symmetric, not negative. Returns (d, rank) with orthonormal columns,
    largest first.
    """
    energy, directions = torch.linalg.eigh(gram)
    retained = (energy[-rank:].sum() / energy.sum()).item()
    return directions[:, -rank:].flip(1), min(1.0, retained)


def turned_towards(basis: Tensor, wanted: Tensor) -> Tensor:
    """basis @ R for the orthogonal R that brings it nearest to `wanted` (Procrustes).

    basis, wanted: (d, r) with orthonormal columns. Where both span the same space, this is
    `wanted`.
    """
    left, _, right = torch.linalg.svd(basis.mT @ wanted)
    return basis @ (left @ right)


def unit_trace(gram: Tensor) -> Tensor:
    """gram: (d, d), scaled to trace 1; zeros stay zeros."""
    return gram / gram.trace().clamp(min=1e-30)


def equal_say(attention: Tensor, neurons: Tensor) -> Tensor:
    """(d, d), sum of W^T W over what attention and FFN read, (p, d) and (q, d), each of trace 1."""
    return unit_trace(attention.mT @ attention) + unit_trace(neurons.mT @ neurons)
