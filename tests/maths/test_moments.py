"""Second moments against float64, and the blending of blocks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from molcli.maths.moments import (
    CHUNK_ROWS,
    cross_moment,
    regression_moments,
    second_moment,
    unit_rms,
)


def test_a_cross_moment_is_the_sum_of_outer_products() -> None:
    """More rows than two chunks hold, and not a multiple of them."""
    x, y = torch.randn(2 * CHUNK_ROWS + 5, 3), torch.randn(2 * CHUNK_ROWS + 5, 2)
    found, exact = cross_moment(x, y), x.double().T @ y.double()
    # A float32 dot product of n terms is off by at most n ulp of the sum of their sizes.
    bound = CHUNK_ROWS * 2**-24 * (x.double().abs().T @ y.double().abs())
    assert found.dtype == torch.float64
    assert ((found - exact).abs() <= bound).all()
    assert torch.equal(second_moment(x), cross_moment(x, x))


def test_chunks_are_summed_in_float64() -> None:
    """2^39 + 2^13, which float32 rounds to 2^39; either chunk is exact in it."""
    x = torch.cat([torch.full((CHUNK_ROWS, 1), 2.0**13), torch.ones(CHUNK_ROWS, 1)])
    assert second_moment(x).item() == 2**39 + 2**13


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    shrinkage=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_shrinkage_mixes_blocks_with_their_sum(
    sizes: list[int], shrinkage: float, seed: int
) -> None:
    """Blocks without rows included."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    y = torch.randn(sum(sizes), 2, generator=generator, dtype=torch.float64)
    offsets = torch.tensor(sizes).cumsum(0).int()
    gram, cross = regression_moments([(x, y, offsets)], shrinkage)
    for block, (own_x, own_y) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
        for found, own, everything in ((gram, own_x, x), (cross, own_y, y)):
            expected = (1 - shrinkage) * own_x.T @ own + shrinkage * x.T @ everything
            torch.testing.assert_close(found[block], expected)
    # The text in two chunks, each with some of every block's rows.
    halves = [[half for part in z.split(sizes) for half in part.tensor_split(2)] for z in (x, y)]
    chunks = [
        (
            torch.cat(halves[0][i::2]),
            torch.cat(halves[1][i::2]),
            torch.tensor([len(h) for h in halves[0][i::2]]).cumsum(0).int(),
        )
        for i in range(2)
    ]
    for found, expected in zip(regression_moments(chunks, shrinkage), (gram, cross), strict=True):
        torch.testing.assert_close(found, expected)


def test_unit_rms_ignores_scale_and_accepts_zero() -> None:
    x = torch.randn(4, 64, dtype=torch.float64)
    torch.testing.assert_close(
        unit_rms(x).square().mean(-1), torch.ones(4).double(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(unit_rms(1e4 * x), unit_rms(10 * x), atol=1e-7, rtol=1e-6)
    assert torch.equal(unit_rms(torch.zeros(2, 3)), torch.zeros(2, 3))
