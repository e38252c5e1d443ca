"""The reading basis: what it keeps, and that nothing of its rank keeps more."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from molcli.maths.bases import reading_basis, square_roots

WIDTH = 7
seeds = st.integers(0, 999)


def problem(seed: int, read: int = 12) -> tuple[Tensor, Tensor]:
    """Maps (read, WIDTH) and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(read, WIDTH, generator=generator, dtype=torch.float64)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return weight, mixing @ mixing.T + 0.1 * torch.eye(WIDTH)


def lost(weight: Tensor, moment: Tensor, basis: Tensor) -> float:
    """Share of the maps' output energy that no linear map of `basis` x can give."""
    cross = moment @ basis.T
    seen = cross @ torch.linalg.solve(basis @ cross, cross.T)
    return ((weight @ (moment - seen)) * weight).sum().item() / (
        (weight @ moment) * weight
    ).sum().item()


@given(seed=seeds)
def test_square_roots(seed: int) -> None:
    _, moment = problem(seed)
    root, inverse = square_roots(moment)
    torch.testing.assert_close(root @ root, moment)
    torch.testing.assert_close(root @ inverse, torch.eye(WIDTH, dtype=torch.float64))


def test_directions_that_never_occur_are_lifted() -> None:
    """At a singular moment the inverse root stays finite: 1e4 over the largest root's inverse."""
    moment = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    _, inverse = square_roots(moment)
    torch.testing.assert_close(
        inverse.diagonal(), torch.tensor([0.5, 1.0, 0.5e4], dtype=torch.float64)
    )


@given(seed=seeds)
def test_a_basis_of_full_rank_loses_nothing(seed: int) -> None:
    weight, moment = problem(seed)
    basis = reading_basis(weight.T @ weight, *square_roots(moment), WIDTH)
    assert basis.retained == pytest.approx(1)
    assert lost(weight, moment, basis.projection) == pytest.approx(0, abs=1e-9)


@given(seed=seeds, rank=st.integers(1, 3))
def test_maps_of_low_rank_need_no_more_than_their_rank(seed: int, rank: int) -> None:
    weight, moment = problem(seed, read=rank)
    basis = reading_basis(weight.T @ weight, *square_roots(moment), rank)
    assert basis.retained == pytest.approx(1)


@given(seed=seeds, rank=st.integers(1, WIDTH - 1))
def test_no_basis_of_this_rank_loses_less(seed: int, rank: int) -> None:
    weight, moment = problem(seed)
    basis = reading_basis(weight.T @ weight, *square_roots(moment), rank)
    best = lost(weight, moment, basis.projection)
    assert best == pytest.approx(1 - basis.retained)
    generator = torch.Generator().manual_seed(seed)
    for size in (0.01, 0.1, 10.0):  # neighbours, and bases that have nothing to do with it
        noise = torch.randn(rank, WIDTH, generator=generator, dtype=torch.float64)
        assert lost(weight, moment, basis.projection + size * noise) >= best - 1e-9


@given(seed=seeds, rank=st.integers(1, WIDTH))
def test_coordinates_are_orthonormal_and_uncorrelated(seed: int, rank: int) -> None:
    """Those that vary most first."""
    weight, moment = problem(seed)
    basis = reading_basis(weight.T @ weight, *square_roots(moment), rank)
    projection, variances = basis.projection, basis.variances
    torch.testing.assert_close(projection @ projection.T, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(projection @ moment @ projection.T, variances.diag())
    assert (variances.diff() <= 0).all()
