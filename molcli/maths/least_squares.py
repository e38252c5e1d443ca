"""Least squares from second moments, in float64.

Only Cholesky, QR and symmetric eigenproblems are used: batched LU solves have been seen to hang in
a CPU build of LAPACK.
"""

import torch
from torch import Tensor

# Larger systems of a batch are solved one after another, so that there is one factor at a time.
BATCHED = 256


def ridge(gram: Tensor, cross: Tensor, penalty: float) -> Tensor:
    """argmin over W of sum |y - W f|^2 + penalty * mean energy * |W|^2.

    gram: (..., p, p), sum of f f^T. cross: (..., p, q), sum of f y^T. Returns (..., q, p).
    """
    if gram.ndim > 2 and gram.shape[-1] > BATCHED:
        pairs = zip(gram, cross, strict=True)
        return torch.stack([ridge(g, c, penalty) for g, c in pairs])
    return torch.cholesky_solve(cross, _factor(gram, penalty)).mT


def reduced_rank(gram: Tensor, cross: Tensor, rank: int, penalty: float) -> tuple[Tensor, Tensor]:
    """The best W = U M of a given rank in sum |y - W f|^2 (reduced-rank regression).

    gram: (..., p, p); cross: (..., p, q). Returns U (..., q, rank) with orthonormal columns, the
    leading directions of the fitted values, and M (..., rank, p).
    """
    full = ridge(gram, cross, penalty)
    fitted = full @ gram @ full.mT
    # All blocks at once: a GPU has a batched solver, and one column after the other to wait for.
    directions = torch.linalg.eigh(fitted).eigenvectors[..., -rank:].flip(-1)
    return directions, directions.mT @ full


def aligning_rotation(
    have: Tensor, wanted: Tensor, gram: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor]:
    """Orthogonal R and scale s with s R have ~ wanted on inputs with this second moment
    (Procrustes).

    have, wanted: (..., r, p); gram: (..., p, p); prior and R: (..., r, r). `prior` has a tenth of
    the say in R, and settles what the inputs leave open. s: (..., 1, 1), 0.05 to 20.
    """
    target = wanted @ gram @ have.mT
    left, _, right = torch.linalg.svd(_unit(target) + 0.1 * _unit(prior))
    turn = left @ right
    energy = (have @ gram @ have.mT).diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-30)
    scale = (turn * target).sum((-2, -1)) / energy
    return turn, scale.clamp(0.05, 20.0)[..., None, None]


def least_squares_left(left: Tensor, product: Tensor) -> Tensor:
    """argmin over X of |left X - product|.

    left: (..., q, r), product: (..., q, p) -> (..., r, p).
    """
    return torch.cholesky_solve(left.mT @ product, _factor(left.mT @ left, 1e-10))


def _factor(gram: Tensor, penalty: float) -> Tensor:
    """Cholesky factor of gram + penalty * mean energy * identity."""
    lifted = gram.clone()
    lifted.diagonal(dim1=-2, dim2=-1).add_(penalty * _mean_energy(gram)[..., 0])
    return torch.linalg.cholesky(lifted)


def _mean_energy(gram: Tensor) -> Tensor:
    """(..., 1, 1), and never 0: a block without tokens gets zeros, not an error."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return mean.clamp(min=1e-30)


def _unit(x: Tensor) -> Tensor:
    """x: (..., r, r), of unit Frobenius norm."""
    return x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)
