"""Bases of the residual stream: directions that blocks read, and directions to truncate to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.maths.decompositions import eigh, svd


def square_roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the symmetric square root of a second moment and its inverse.

    Args:
        moment: C, (d, d) float64, symmetric, positive semi-definite. Eigenvalues below 1e-8 of the
            largest one are raised to that.

    Returns:
        C^1/2 and C^-1/2, (d, d) float64 each.
    """
    values, vectors = eigh(moment)
    values = values.clamp(min=values.max() * 1e-8)
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT


@dataclass(frozen=True)
class ReadingBasis:
    """A basis that linear maps read their inputs through.

    Attributes:
        projection: (rank, d) float64, orthonormal rows.
        variances: (rank,) float64, descending: second moments of the projected inputs, which are
            uncorrelated.
        retained: share of the reading energy that the basis keeps, 0 to 1.
    """

    projection: Tensor
    variances: Tensor
    retained: float


def reading_basis(gram: Tensor, root: Tensor, inverse_root: Tensor, rank: int) -> ReadingBasis:
    """Compute the projection that keeps most of what some linear maps read from their inputs.

    It minimises the summed |W x - W' P x|^2 over maps W' on a projection P of the given rank: the
    leading eigenvectors V of C^1/2 gram C^1/2 give the subspace of V^T C^-1/2.

    Within that subspace, the basis follows the inputs' principal axes. A residual stream has a few
    coordinates that are a hundred times larger than the rest. The whitened basis mixes them into
    all coordinates, where they would have to cancel again, and bf16 is too coarse for that.

    Args:
        gram: (d, d) float64, sum of W^T W over the linear maps W.
        root: C^1/2, (d, d) float64, of the inputs' second moment C; see `square_roots`.
        inverse_root: C^-1/2, (d, d) float64.
        rank: number of directions to keep, at most d.

    Source: whitened truncation, SVD-LLM (arXiv 2403.07378).
    """
    energy, directions = eigh(root @ gram @ root)
    kept = directions[:, -rank:].flip(1)
    retained = _share(energy, rank)
    orthonormal = torch.linalg.qr(inverse_root @ kept).Q
    half = root @ orthonormal
    variances, axes = eigh(half.mT @ half)
    return ReadingBasis((orthonormal @ axes.flip(1)).mT, variances.flip(0), retained)


def leading_directions(gram: Tensor, rank: int) -> tuple[Tensor, float]:
    """Compute the principal directions of a second moment.

    Args:
        gram: (d, d) float64, symmetric, positive semi-definite.
        rank: number of directions.

    Returns:
        (d, rank) with orthonormal columns, largest eigenvalue first; and the share of the trace
        that they hold, 0 to 1.
    """
    energy, directions = eigh(gram)
    retained = _share(energy, rank)
    return directions[:, -rank:].flip(1), min(1.0, retained)


def procrustes_rotation(basis: Tensor, wanted: Tensor) -> Tensor:
    """Rotate a basis within its span to be nearest to another one (orthogonal Procrustes).

    Args:
        basis: (d, r) with orthonormal columns.
        wanted: (d, r) with orthonormal columns.

    Returns:
        (d, r), basis @ R for the best orthogonal R. Where both bases span the same space, this is
        `wanted`.
    """
    left, _, right = svd(basis.mT @ wanted)
    return basis @ (left @ right)


def unit_trace(gram: Tensor) -> Tensor:
    """Scale a (d, d) matrix to trace 1. Zeros stay zeros."""
    return gram / gram.trace().clamp(min=1e-30)


def trace_normalised_sum(attention: Tensor, neurons: Tensor) -> Tensor:
    """Add the Gram matrices of attention and FFN, each scaled to trace 1.

    Args:
        attention: (p, d), rows of the matrices of attention.
        neurons: (q, d), rows of the matrices of the FFN.

    Returns:
        (d, d), the sum of W^T W over both, each of trace 1.
    """
    return unit_trace(attention.mT @ attention) + unit_trace(neurons.mT @ neurons)


def _share(energy: Tensor, rank: int) -> float:
    """Return the share of the last `rank` entries, (d,) ascending; 1 where there is no energy."""
    total = energy.sum()
    return (energy[-rank:].sum() / total).item() if total > 0 else 1.0
