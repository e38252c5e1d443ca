"""The regression behind `molcli plan --calibration`, and its rank correlation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molcli.estimate.forecast import (
    Forecast,
    Predictors,
    fit_forecast,
    leave_one_out_forecasts,
    rank_correlation,
    reading_spectrum,
)
from molcli.maths.bases import reading_basis, square_roots


def drawn(count: int, seed: int = 0) -> list[Predictors]:
    generator = np.random.default_rng(seed)
    return [Predictors(*values) for values in generator.uniform(0.1, 8, (count, 6)).tolist()]


def test_fit_recovers_the_constants_of_a_power_law() -> None:
    law = Forecast((0.3, 0.8, -0.4, -0.2, 0.1, 0.5, -0.1))
    settings = drawn(40)
    kl = [law.kl(setting) for setting in settings]
    assert fit_forecast(settings, kl).constants == pytest.approx(law.constants, abs=1e-3)
    assert leave_one_out_forecasts(settings, kl) == pytest.approx(kl, rel=1e-3)


def test_a_constant_predictor_gets_the_constant_zero() -> None:
    settings = [replace(p, weights=1.0, clones=4.0) for p in drawn(20)]
    found = fit_forecast(settings, [p.lost_reading for p in settings]).constants
    assert found[3] == found[6] == 0
    assert found[2] == pytest.approx(1, abs=1e-3)


def test_more_text_helps_until_there_is_enough() -> None:
    law, some = Forecast((0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)), drawn(1)[0]
    kl = [law.kl(replace(some, tokens_a_feature=tokens)) for tokens in (1e-3, 10, 100, 1000, 1e6)]
    assert kl == pytest.approx([1e4 + 1, 2, 1.1, 1.01, 1], rel=1e-3)


def test_leave_one_out_forecasts_do_not_see_the_target() -> None:
    """Noise is fitted in part, but never forecast."""
    settings, noise = drawn(12), np.random.default_rng(1).uniform(0.1, 1, 12).tolist()
    fitted = [fit_forecast(settings, noise).kl(setting) for setting in settings]
    assert rank_correlation(fitted, noise) > rank_correlation(
        leave_one_out_forecasts(settings, noise), noise
    )


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 900]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    # Ties share their mean rank: 1, 2.5, 2.5 against 1, 2, 3.
    assert rank_correlation([0, 7, 7], [0, 1, 2]) == pytest.approx(3**0.5 / 2)


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=20).filter(lambda v: len(set(v)) > 1))
def test_rank_correlation_depends_on_order_only(values: list[int]) -> None:
    assert rank_correlation(values, [value**3 for value in values]) == pytest.approx(1)
    assert rank_correlation(values, [-2 * value for value in values]) == pytest.approx(-1)


def test_sums_of_a_spectrum_are_what_bases_retain() -> None:
    torch.manual_seed(0)
    factors = torch.randn(2, 9, 6, dtype=torch.float64)
    gram, moment = factors.mT @ factors
    spectrum = reading_spectrum(gram, moment)
    assert spectrum.sum().item() == pytest.approx(1)
    for rank in (1, 3, 6):
        retained = reading_basis(gram, *square_roots(moment), rank).retained
        assert spectrum[:rank].sum().item() == pytest.approx(retained)
