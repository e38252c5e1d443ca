"""Decompositions of matrices; those that are not finite are refused in words."""

from typing import NamedTuple

import torch
from torch import Tensor

from molcli.errors import MolError


class Eigen(NamedTuple):
    """Eigenvalues (..., d), ascending, and eigenvectors (..., d, d) in columns."""

    values: Tensor
    vectors: Tensor


class Svd(NamedTuple):
    """Left vectors, singular values, and right vectors, transposed."""

    left: Tensor
    values: Tensor
    right: Tensor


def eigh(matrix: Tensor) -> Eigen:
    """Decompose symmetric matrices, (..., d, d), as `torch.linalg.eigh`.

    Raises:
        MolError: If they are not finite.
    """
    try:
        return Eigen(*torch.linalg.eigh(matrix))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise overflow() from error


def svd(matrix: Tensor) -> Svd:
    """Decompose matrices, (..., m, n), as `torch.linalg.svd`.

    Raises:
        MolError: If they are not finite.
    """
    try:
        return Svd(*torch.linalg.svd(matrix))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise overflow() from error


def overflow() -> MolError:
    """Return the error for sums over activations that are not finite."""
    return MolError(
        "activations or weights overflow while a layer is fitted",
        allowed="a model whose activations have finite squares in float64",
        hint="look for very large weights, and download the weights again",
    )
