"""Which directions of the residual stream a thin block reads."""

import torch
from torch import Tensor


def square_roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """C^1/2 and C^-1/2 of a second moment C (d, d) float64, tiny eigenvalues lifted."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=values.max() * 1e-8)
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT


def reading_basis(
    gram: Tensor, root: Tensor, inverse_root: Tensor, rank: int
) -> tuple[Tensor, float]:
    """The projection that keeps most of what some linear maps read from their inputs.

    gram: (d, d) float64, sum of W^T W over those maps. root, inverse_root: `square_roots` of their
    inputs' second moment C. Minimises the summed |W x - W' P x|^2 over maps W' on a rank-r
    projection P: the leading eigenvectors V of C^1/2 gram C^1/2 give P = V^T C^-1/2
    (whitened truncation, arXiv 2403.07378).
    Returns P (rank, d), under which inputs have unit second moments, and the share of the
    energy that it retains.
    """
    energy, directions = torch.linalg.eigh(root @ gram @ root)
    kept = directions[:, -rank:].flip(1)
    retained = (energy[-rank:].sum() / energy.sum()).item()
    return kept.mT @ inverse_root, retained
