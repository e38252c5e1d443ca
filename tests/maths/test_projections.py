"""Truncation bases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molcli.maths.bases import leading_directions, procrustes_rotation, unit_trace


def orthonormal(generator: torch.Generator, d: int, r: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64)).Q


@given(st.integers(0, 100), st.integers(1, 8))
def test_leading_directions_keep_what_the_largest_singular_values_hold(seed: int, r: int) -> None:
    """The best rank-r approximation (Eckart and Young): its error is the rest of the spectrum."""
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis, retained = leading_directions(x.mT @ x, r)
    values = torch.linalg.svdvals(x).square()
    torch.testing.assert_close(basis.mT @ basis, torch.eye(r, dtype=torch.float64))
    assert retained == pytest.approx((values[:r].sum() / values.sum()).item())
    left = (x - x @ basis @ basis.mT).square().sum().item()
    assert left == pytest.approx(values[r:].sum().item(), abs=1e-9)


@given(st.integers(0, 100), st.integers(1, 6))
def test_a_turned_basis_spans_the_same_and_is_nearest(seed: int, r: int) -> None:
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
