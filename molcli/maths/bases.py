"""Which directions of the residual stream a thin block reads."""

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
