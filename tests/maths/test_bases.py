"""Bases keep what they claim to, and no basis of the same rank keeps more."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from molcli.errors import MolError
from molcli.maths.bases import (
    leading_directions,
    procrustes_rotation,
    reading_basis,
    square_roots,
    unit_trace,
)

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


def test_square_roots_of_a_singular_moment_are_finite() -> None:
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


def orthonormal(generator: torch.Generator, d: int, r: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64)).Q


@given(st.integers(0, 100), st.integers(1, 8))
def test_leading_directions_retain_the_largest_singular_values(seed: int, r: int) -> None:
    """The best rank-r approximation (Eckart and Young): its error is the rest of the spectrum."""
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis, retained = leading_directions(x.mT @ x, r)
    values = torch.linalg.svdvals(x).square()
    torch.testing.assert_close(basis.mT @ basis, torch.eye(r, dtype=torch.float64))
    assert retained == pytest.approx((values[:r].sum() / values.sum()).item())
    left = (x - x @ basis @ basis.mT).square().sum().item()
    assert left == pytest.approx(values[r:].sum().item(), abs=1e-9)


@given(st.integers(0, 100), st.integers(1, 6))
def test_procrustes_rotation_keeps_the_span_and_is_nearest(seed: int, r: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis, wanted, other = (orthonormal(generator, 9, r) for _ in range(3))
    turned = procrustes_rotation(basis, wanted)
    torch.testing.assert_close(turned @ turned.mT, basis @ basis.mT)
    best = (turned - wanted).square().sum()
    rotation = orthonormal(generator, r, r)
    for candidate in (basis, basis @ rotation):
        assert best <= (candidate - wanted).square().sum() + 1e-9
    same_space = other @ rotation
    torch.testing.assert_close(procrustes_rotation(other, same_space), same_space)


def test_unit_trace() -> None:
    assert unit_trace(torch.diag(torch.tensor([1.0, 3.0]))).trace() == 1
    assert unit_trace(torch.zeros(2, 2)).trace() == 0


def test_matrices_that_are_not_finite_are_refused() -> None:
    wrong = torch.full((3, 3), torch.nan, dtype=torch.float64)
    for use in (square_roots, lambda moment: procrustes_rotation(moment, moment)):
        with pytest.raises(MolError, match="overflow"):
            use(wrong)
