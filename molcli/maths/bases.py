"""Directions of the residual stream: those that blocks read, and those that truncation keeps."""

from dataclasses import dataclass

import torch
from torch import Tensor


def square_roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """C^1/2 and C^-1/2 of a second moment C (d, d) float64, tiny eigenvalues lifted."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=values.max() * 1e-8)
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT


@dataclass(frozen=True)
class ReadingBasis:
    """projection: (rank, d) float64, orthonormal rows. variances: (rank,), second moments of the
    projected inputs, which are uncorrelated. retained: share of the reading energy it keeps.
    """

    projection: Tensor
    variances: Tensor
    retained: float


def reading_basis(gram: Tensor, root: Tensor, inverse_root: Tensor, rank: int) -> ReadingBasis:
    """The projection that keeps most of what some linear maps read from their inputs.

    gram: (d, d) float64, sum of W^T W over those maps. root, inverse_root: `square_roots` of their
    inputs' second moment C. Minimises the summed |W x - W' P x|^2 over maps W' on a rank-r
    projection P: the leading eigenvectors V of C^1/2 gram C^1/2 give the subspace of V^T C^-1/2
    (whitened truncation, arXiv 2403.07378).

    Within that subspace the basis follows the inputs' principal axes. A residual stream has a few
    coordinates a hundred times larger than the rest: mixed into all coordinates, as the whitened
    basis has them, they would have to cancel again, which bf16 cannot do.
    """
    energy, directions = torch.linalg.eigh(root @ gram @ root)
    kept = directions[:, -rank:].flip(1)
    retained = (energy[-rank:].sum() / energy.sum()).item()
    orthonormal = torch.linalg.qr(inverse_root @ kept).Q
    half = root @ orthonormal
    variances, axes = torch.linalg.eigh(half.mT @ half)
    return ReadingBasis((orthonormal @ axes.flip(1)).mT, variances.flip(0), retained)


def leading_directions(gram: Tensor, rank: int) -> tuple[Tensor, float]:
    """The `rank` directions that hold most of a second moment, and the share they hold.

    gram: (d, d) float64, symmetric, not negative. Returns (d, rank) with orthonormal columns,
    largest first.
    """
    energy, directions = torch.linalg.eigh(gram)
    retained = (energy[-rank:].sum() / energy.sum()).item()
    return directions[:, -rank:].flip(1), min(1.0, retained)


def procrustes_rotation(basis: Tensor, wanted: Tensor) -> Tensor:
    """basis @ R for the orthogonal R that brings it nearest to `wanted` (Procrustes).

    basis, wanted: (d, r) with orthonormal columns. Where both span the same space, this is
    `wanted`.
    """
    left, _, right = torch.linalg.svd(basis.mT @ wanted)
    return basis @ (left @ right)


def unit_trace(gram: Tensor) -> Tensor:
    """gram: (d, d), scaled to trace 1; zeros stay zeros."""
    return gram / gram.trace().clamp(min=1e-30)


def trace_normalised_sum(attention: Tensor, neurons: Tensor) -> Tensor:
    """(d, d), sum of W^T W over what attention and FFN read, (p, d) and (q, d), each of trace 1."""
    return unit_trace(attention.mT @ attention) + unit_trace(neurons.mT @ neurons)
