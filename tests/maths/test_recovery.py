"""The forecast of a falling loss."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from molcli.maths.recovery import FEWEST, REACH, tokens_to_recovery

STARTS = st.floats(1e-3, 1e2)
EXPONENTS = st.floats(0.2, 2.0)
WINDOWS = st.integers(FEWEST, 200)
RECOVERIES = st.floats(0.05, 0.95)


def power_law(start: float, exponent: float, windows: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens, kl: the KL is `start` at the first of windows of 1000 tokens."""
    tokens = 1000.0 * np.arange(1, windows + 1)
    return tokens, start * (tokens / 1000) ** -exponent


@given(STARTS, EXPONENTS, WINDOWS, RECOVERIES)
def test_a_power_law_is_continued_exactly(
    start: float, exponent: float, windows: int, recovery: float
) -> None:
    tokens, kl = power_law(start, exponent, windows)
    end = 1000 * (1 - recovery) ** (-1 / exponent)
    assume(abs(end / tokens[-1] - 1) > 1e-6)
    assume(abs(end / tokens[-1] / REACH - 1) > 1e-6)
    got = tokens_to_recovery(tokens.tolist(), kl.tolist(), recovery)
    if end < tokens[-1]:
        assert got == 0.0
    elif end > REACH * tokens[-1]:
        assert got is None
    else:
        assert got == pytest.approx(end - tokens[-1], rel=1e-5)


@given(st.integers(0, 2**32 - 1), EXPONENTS)
def test_noise_and_wild_windows_move_it_little(seed: int, exponent: float) -> None:
    """Noise of 2% a window, and one window in twelve ten times too high."""
    tokens, kl = power_law(4.0, exponent, 240)
    generator = np.random.default_rng(seed)
    noisy = kl * np.exp(0.02 * generator.standard_normal(240))
    noisy[0] = kl[0]
    noisy[6::12] *= 10
    recovery = 1 - kl[-1] / kl[0] * 2**-exponent  # reached after as many tokens again
    got = tokens_to_recovery(tokens.tolist(), noisy.tolist(), recovery)
    assert got is not None
    assert got == pytest.approx(tokens[-1], rel=0.25 / exponent)


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=FEWEST, max_size=80),
    RECOVERIES,
    RECOVERIES,
)
def test_more_recovery_takes_no_fewer_tokens(kl: list[float], one: float, two: float) -> None:
    tokens = [100.0 * (i + 1) for i in range(len(kl))]
    less, more = (tokens_to_recovery(tokens, kl, share) for share in sorted((one, two)))
    if more is not None:
        assert less is not None
        assert less <= more * (1 + 1e-9)


@given(STARTS, EXPONENTS, RECOVERIES, st.floats(0.1, 10), st.floats(0.1, 10))
def test_units_do_not_matter(
    start: float, exponent: float, recovery: float, tokens_unit: float, kl_unit: float
) -> None:
    tokens, kl = power_law(start, exponent, 40)
    assume(abs(40 * (1 - recovery) ** (1 / exponent) - 1) > 1e-6)
    assume(abs(40 * REACH * (1 - recovery) ** (1 / exponent) - 1) > 1e-6)
    one = tokens_to_recovery(tokens.tolist(), kl.tolist(), recovery)
    two = tokens_to_recovery((tokens_unit * tokens).tolist(), (kl_unit * kl).tolist(), recovery)
    assert two == (None if one is None else pytest.approx(tokens_unit * one, rel=1e-5))


def test_what_tells_nothing_gives_none() -> None:
    tokens, kl = (values.tolist() for values in power_law(1.0, 0.3, 20))
    assert tokens_to_recovery(tokens, kl, 0.7) is not None
    assert tokens_to_recovery(tokens[: FEWEST - 1], kl[: FEWEST - 1], 0.7) is None
    assert tokens_to_recovery(tokens, [1.0] * 20, 0.7) is None
    assert tokens_to_recovery(tokens, kl[::-1], 0.7) is None  # it rises, and is above the goal
    assert tokens_to_recovery(tokens, [0.0, float("nan"), *kl[2:9], *[0.0] * 11], 0.7) is None
    assert tokens_to_recovery([], [], 0.7) is None
