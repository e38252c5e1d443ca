"""Least squares from second moments, in float64.

Only Cholesky, QR and symmetric eigenproblems are used, because batched LU solves have hung in a CPU
build of LAPACK.
"""

import torch
from torch import Tensor

from molcli.maths.decompositions import eigh, overflow, svd

# Larger systems of a batch are solved one after another, so that memory holds one factor at a time.
MOST_BATCHED = 256
_SMALLEST_PENALTY, _LARGEST_PENALTY = 1e-14, 1e3  # of those that are tried where one is too small


def ridge(gram: Tensor, cross: Tensor, penalty: float) -> Tensor:
    """Solve ridge regression: argmin over W of sum |y - W f|^2 + penalty * e * |W|^2.

    Args:
        gram: (..., p, p), sum of f f^T over samples.
        cross: (..., p, q), sum of f y^T over samples.
        penalty: relative to e, the mean of the Gram matrix's diagonal.

    Returns:
        W, (..., q, p). A system without samples gets zeros.
    """
    if gram.ndim > 2 and gram.shape[-1] > MOST_BATCHED:
        pairs = zip(gram, cross, strict=True)
        return torch.stack([ridge(g, c, penalty) for g, c in pairs])
    return torch.cholesky_solve(cross, _factor(gram, penalty)).mT


def arrow_ridge(gram: Tensor, cross: Tensor, shared: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Solve one ridge regression whose samples each have shared features and those of one block.

    argmin of the sum over blocks b and their samples of |y - W f_shared - W_b f_b|^2, with the
    penalty of `ridge` for the mean diagonal of the shared features' Gram matrix, and of each
    block's. Exact: the blocks' weights are eliminated, which leaves a system of the shared ones
    (a Schur complement).

    Args:
        gram: (B, p, p), a block's sum of f f^T, the shared features first.
        cross: (B, p, q), a block's sum of f y^T.
        shared: number of shared features.
        penalty: as for `ridge`.

    Returns:
        W, (1, q, shared), and all W_b, (B, q, p - shared).
    """
    total, target = gram[:, :shared, :shared].sum(0), cross[:, :shared].sum(0)
    lifted = total + penalty * _mean_energy(total) * torch.eye(shared).to(total)
    solved = []
    for g, c in zip(gram, cross, strict=True):
        factor, across = _factor(g[shared:, shared:], penalty), g[shared:, :shared]
        own = torch.cholesky_solve(torch.cat([across, c[shared:]], dim=1), factor)
        lifted = lifted - across.mT @ own[:, :shared]
        target = target - across.mT @ own[:, shared:]
        solved.append(own)
    # The penalty is in `lifted` already. Rounding alone may need one.
    first = torch.cholesky_solve(target, _factor((lifted + lifted.mT) / 2, 0.0))
    rest = [(own[:, shared:] - own[:, :shared] @ first).mT for own in solved]
    return first.mT[None], torch.stack(rest)


def reduced_rank(gram: Tensor, cross: Tensor, rank: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Find the best W = U M of a given rank in sum |y - W f|^2 (reduced-rank regression).

    Args:
        gram: (..., p, p), sum of f f^T over samples.
        cross: (..., p, q), sum of f y^T over samples.
        rank: of W.
        penalty: as for `ridge`.

    Returns:
        U, (..., q, rank) with orthonormal columns, the leading directions of the fitted values;
        and M, (..., rank, p).

    Source: Izenman, Reduced-rank regression for the multivariate linear model, 1975.
    """
    full = ridge(gram, cross, penalty)
    fitted = full @ gram @ full.mT
    # In one batch: a GPU's solver processes columns one after another, so a batch costs little more
    # time than one matrix.
    directions = eigh(fitted).vectors[..., -rank:].flip(-1)
    return directions, directions.mT @ full


def aligning_rotation(
    have: Tensor, wanted: Tensor, gram: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the rotation R and the scale s for which s R have is nearest to wanted (Procrustes).

    Args:
        have: (..., r, p), a linear map.
        wanted: (..., r, p), the map to match.
        gram: (..., p, p), second moment of the inputs that both maps are compared on.
        prior: (..., r, r), a rotation that counts a tenth as much as the inputs. It determines R in
            directions in which there are no inputs.

    Returns:
        R, (..., r, r), orthogonal; and s, (..., 1, 1), clamped to 0.05 to 20.
    """
    target = wanted @ gram @ have.mT
    left, _, right = svd(_unit(target) + 0.1 * _unit(prior))
    rotation = left @ right
    energy = (have @ gram @ have.mT).diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-30)
    scale = (rotation * target).sum((-2, -1)) / energy
    return rotation, scale.clamp(0.05, 20.0)[..., None, None]


def least_squares_left(left: Tensor, product: Tensor) -> Tensor:
    """Solve argmin over X of |left X - product|.

    Args:
        left: (..., q, r), of full column rank.
        product: (..., q, p).

    Returns:
        X, (..., r, p).
    """
    return torch.cholesky_solve(left.mT @ product, _factor(left.mT @ left, 1e-10))


def _factor(gram: Tensor, penalty: float) -> Tensor:
    """Compute the Cholesky factor of gram + penalty * mean diagonal * identity.

    Where rounding leaves this indefinite, as channels do that are zero or repeat each other, the
    penalty is raised tenfold until there is a factor: a stronger ridge.

    Raises:
        MolError: If the Gram matrix is not finite.
    """
    while True:
        lifted = gram.clone()
        lifted.diagonal(dim1=-2, dim2=-1).add_(penalty * _mean_energy(gram)[..., 0])
        factor, failed = torch.linalg.cholesky_ex(lifted)
        if not bool(failed.any()):
            return factor
        if penalty > _LARGEST_PENALTY or not bool(lifted.isfinite().all()):
            raise overflow()
        penalty = max(10 * penalty, _SMALLEST_PENALTY)


def _mean_energy(gram: Tensor) -> Tensor:
    """Mean of the diagonal, (..., 1, 1), never 0: a block without tokens gets zeros, no error."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return mean.clamp(min=1e-30)


def _unit(x: Tensor) -> Tensor:
    """Scale (..., r, r) matrices to unit Frobenius norm."""
    return x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)
