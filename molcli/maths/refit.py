"""Least squares from second moments, in float64.

Only Cholesky, QR and symmetric eigenproblems are used: batched LU solves have been seen to hang in
a CPU build of LAPACK.
"""

import torch
from torch import Tensor


def ridge(gram: Tensor, cross: Tensor, penalty: float) -> Tensor:
    """argmin over W of sum |y - W f|^2 + penalty * mean energy * |W|^2.

    gram: (..., p, p), sum of f f^T. cross: (..., p, q), sum of f y^T. Returns (..., q, p).
    """
    return torch.cholesky_solve(cross, _factor(gram, penalty)).mT


def reduced_rank(gram: Tensor, cross: Tensor, rank: int, penalty: float) -> tuple[Tensor, Tensor]:
    """The best W = U M of a given rank in sum |y - W f|^2 (reduced-rank regression).

    gram: (..., p, p); cross: (..., p, q). Returns U (..., q, rank) with orthonormal columns, the
    leading directions of the fitted values, and M (..., rank, p).
    """
    full = ridge(gram, cross, penalty)
    fitted = full @ gram @ full.mT
    directions = torch.linalg.eigh(fitted).eigenvectors[..., -rank:].flip(-1)
    return directions, directions.mT @ full


def aligning_turn(
    have: Tensor, wanted: Tensor, gram: Tensor, prior: Tensor, pull: float = 0.1
) -> Tensor:
    """R with R have ~ wanted on inputs with this second moment, drawn towards `prior`.

    have, wanted: (..., r, p); gram: (..., p, p); prior and R: (..., r, r). pull: weight of the
    prior, relative to the mean energy of `have`.
    """
    inner = have @ gram @ have.mT
    weight = pull * _mean_energy(inner)
    right = wanted @ gram @ have.mT + weight * prior
    return torch.cholesky_solve(right.mT, _factor(inner, pull)).mT


def factor_left(product: Tensor, right: Tensor) -> Tensor:
    """X with X right = product. product: (..., q, r), right: (..., r, r) -> (..., q, r)."""
    q, r = torch.linalg.qr(right.mT)
    return torch.linalg.solve_triangular(r, q.mT @ product.mT, upper=True).mT


def least_squares_left(left: Tensor, product: Tensor) -> Tensor:
    """argmin over X of |left X - product|.

    left: (..., q, r), product: (..., q, p) -> (..., r, p).
    """
    return torch.cholesky_solve(left.mT @ product, _factor(left.mT @ left, 1e-10))


def _factor(gram: Tensor, penalty: float) -> Tensor:
    """Cholesky factor of gram + penalty * mean energy * identity."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky(gram + penalty * _mean_energy(gram) * eye)


def _mean_energy(gram: Tensor) -> Tensor:
    """(..., 1, 1), and never 0: a block without tokens gets zeros, not an error."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return mean.clamp(min=1e-30)
