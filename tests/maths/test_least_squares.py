"""Least squares from moments against least squares on the samples themselves."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from molcli.errors import MolError
from molcli.maths.least_squares import (
    aligning_rotation,
    arrow_ridge,
    least_squares_left,
    reduced_rank,
    ridge,
)

seeds = st.integers(0, 999)
P, Q, SAMPLES = 5, 4, 30


class Samples(NamedTuple):
    """features: (blocks, n, P), targets: (blocks, n, Q), gram and cross: their moments."""

    features: Tensor
    targets: Tensor
    gram: Tensor
    cross: Tensor


def samples(seed: int, blocks: int = 2) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    f, y, mixing = (
        torch.randn(blocks, *shape, generator=generator, dtype=torch.float64)
        for shape in ((SAMPLES, P), (SAMPLES, Q), (P, Q))
    )
    y = f @ mixing + y
    return Samples(f, y, f.mT @ f, f.mT @ y)


def loss(weight: Tensor, s: Samples) -> Tensor:
    """(blocks,) summed squared error of W f."""
    return (s.targets - s.features @ weight.mT).square().sum((-2, -1))


@given(seed=seeds, penalty=st.sampled_from([1e-12, 1e-2, 3.0]))
def test_ridge_is_least_squares_with_the_penalty_as_rows(seed: int, penalty: float) -> None:
    s = samples(seed)
    energy = s.gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    rows = (penalty * energy).sqrt() * torch.eye(P, dtype=torch.float64)
    expected = torch.linalg.lstsq(
        torch.cat([s.features, rows], dim=1),
        torch.cat([s.targets, torch.zeros(2, P, Q, dtype=torch.float64)], dim=1),
    ).solution.mT
    torch.testing.assert_close(ridge(s.gram, s.cross, penalty), expected)


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_the_penalty_is_relative_to_the_features(seed: int, scale: float) -> None:
    """Features of another unit give the same prediction."""
    s = samples(seed)
    scaled = ridge(scale**2 * s.gram, scale * s.cross, 0.1)
    torch.testing.assert_close(scaled * scale, ridge(s.gram, s.cross, 0.1))


@given(seed=seeds, rank=st.integers(1, Q))
def test_reduced_rank_reaches_the_bound(seed: int, rank: int) -> None:
    """Eckart-Young: full least squares, plus the fitted values' smaller singular values."""
    s = samples(seed)
    left, right = reduced_rank(s.gram, s.cross, rank, 1e-12)
    eye = torch.eye(rank, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(left.mT @ left, eye)
    full = ridge(s.gram, s.cross, 1e-12)
    dropped = torch.linalg.svdvals(s.features @ full.mT)[:, rank:].square().sum(-1)
    torch.testing.assert_close(loss(left @ right, s), loss(full, s) + dropped)


@given(seed=seeds, rank=st.integers(1, Q - 1))
def test_no_other_map_of_the_rank_is_better(seed: int, rank: int) -> None:
    """Neither random ones, each with its best second factor, nor neighbours of the solution."""
    s = samples(seed)
    best = loss(torch.matmul(*reduced_rank(s.gram, s.cross, rank, 1e-12)), s)
    generator = torch.Generator().manual_seed(seed)
    for size in (0.01, 1.0, 100.0):
        left, _ = reduced_rank(s.gram, s.cross, rank, 1e-12)
        left = left + size * torch.randn(left.shape, generator=generator, dtype=torch.float64)
        full = ridge(s.gram, s.cross, 1e-12)
        assert (loss(left @ torch.linalg.lstsq(left, full).solution, s) >= best - 1e-9).all()


@given(seed=seeds)
def test_least_squares_left(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(2, 2 * P, Q, generator=generator, dtype=torch.float64)
    product = torch.randn(2, 2 * P, P, generator=generator, dtype=torch.float64)
    expected = torch.linalg.lstsq(left, product).solution
    # The normal equations carry a penalty of 1e-10, times the condition of left^T left.
    torch.testing.assert_close(least_squares_left(left, product), expected, rtol=1e-6, atol=1e-6)


def random_turn(generator: torch.Generator) -> Tensor:
    """(2, 3, 3), orthogonal."""
    return torch.linalg.qr(torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)).Q


@given(seed=seeds, scale=st.floats(0.1, 10))
def test_aligning_rotation_recovers_rotation_and_scale(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    have = torch.randn(2, 3, P, generator=generator, dtype=torch.float64)
    turn = random_turn(generator)
    found, size = aligning_rotation(have, scale * turn @ have, samples(seed).gram, 3 * turn)
    torch.testing.assert_close(found, turn)
    torch.testing.assert_close(size, torch.full_like(size, scale))


@given(seed=seeds)
def test_no_other_rotation_or_scale_aligns_better(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    have, wanted, prior = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        for shape in ((3, P), (3, P), (3, 3))
    )
    gram = samples(seed).gram
    found, size = aligning_rotation(have, wanted, gram, prior)
    torch.testing.assert_close(found @ found.mT, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))

    def agreement(turn: Tensor) -> Tensor:
        return sum(
            weight * (turn * x).sum((-2, -1)) / x.norm(dim=(-2, -1))
            for weight, x in ((1.0, wanted @ gram @ have.mT), (0.1, prior))
        )

    for _ in range(3):
        assert (agreement(random_turn(generator)) <= agreement(found) + 1e-9).all()

    def error(s: Tensor) -> Tensor:
        difference = s * found @ have - wanted
        return ((difference @ gram) * difference).sum((-2, -1))

    inside = (size > 0.05).flatten()  # else no positive scale helps, and the least one is taken
    for factor in (0.99, 1.01):
        assert (error(factor * size) > error(size))[inside].all()


def test_a_block_without_tokens_gets_zeros_and_does_not_change_others() -> None:
    s = samples(0)
    keep = torch.tensor([1.0, 0.0], dtype=torch.float64)[:, None, None]
    gram, cross = s.gram * keep, s.cross * keep
    fitted = ridge(gram, cross, 1e-2)
    assert torch.equal(fitted[1], torch.zeros(Q, P, dtype=torch.float64))
    torch.testing.assert_close(fitted[0], ridge(s.gram, s.cross, 1e-2)[0])
    left, right = reduced_rank(gram, cross, 2, 1e-2)
    assert left.isfinite().all() and not right[1].any()
    prior = torch.linalg.qr(torch.randn(2, 2, 2, dtype=torch.float64)).Q
    turn, size = aligning_rotation(right, right, gram, prior)
    torch.testing.assert_close(turn[1], prior[1])  # nothing speaks against the prior
    assert not torch.allclose(turn[0], prior[0], rtol=0.1)
    assert size.isfinite().all()


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("penalty", [0.0, 1e-12, 1e-3])
def test_ridge_of_fewer_rows_than_channels_is_finite(rows: int, penalty: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, rows, 8, generator=generator, dtype=torch.float64)
    x[..., 0] = 0  # a channel that is always zero
    found = ridge(x.mT @ x, x.mT @ x, penalty)
    assert found.isfinite().all()
    if rows:
        torch.testing.assert_close(x @ found.mT, x, rtol=1e-2, atol=1e-2)


def test_ridge_refuses_sums_that_overflowed() -> None:
    gram = torch.full((3, 3), float("inf"), dtype=torch.float64)
    with pytest.raises(MolError, match="overflow"):
        ridge(gram, gram, 1e-3)


@given(seed=seeds)
def test_arrow_ridge_is_the_ridge_of_all_blocks_together(seed: int) -> None:
    s, shared, penalty = samples(seed, blocks=3), 2, 1e-2
    own = P - shared
    first, rest = arrow_ridge(s.gram, s.cross, shared, penalty)
    # One system with a column for each block's own features, which are zero in other blocks.
    wide = torch.zeros(3, SAMPLES, shared + 3 * own, dtype=torch.float64)
    for block in range(3):
        wide[block, :, :shared] = s.features[block, :, :shared]
        start = shared + block * own
        wide[block, :, start : start + own] = s.features[block, :, shared:]
    rows, targets = wide.flatten(0, 1), s.targets.flatten(0, 1)
    gram = rows.mT @ rows
    energies = [gram.diagonal()[:shared].mean().expand(shared)]
    for block in range(3):
        start = shared + block * own
        energies.append(gram.diagonal()[start : start + own].mean().expand(own))
    lifted = gram + penalty * torch.cat(energies).diag()
    wanted = torch.linalg.solve(lifted, rows.mT @ targets).mT
    torch.testing.assert_close(torch.cat([first[0], *rest], dim=1), wanted)


def test_arrow_ridge_leaves_a_block_without_samples_at_zero() -> None:
    s = samples(0, blocks=2)
    s.gram[1], s.cross[1] = 0, 0
    first, rest = arrow_ridge(s.gram, s.cross, 2, 1e-2)
    assert first.isfinite().all() and not rest[1].any() and rest[0].any()
