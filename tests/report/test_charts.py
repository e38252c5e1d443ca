"""Axes: round ticks around the values, and monotonic coordinates."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molcli.report.charts import linear_axis, log_axis

NUMBERS = st.floats(-1e9, 1e9, allow_subnormal=False)


@given(st.lists(NUMBERS, max_size=20), st.booleans())
def test_ticks_are_around_all_values(values: list[float], from_zero: bool) -> None:
    axis = linear_axis(values, 0, 100, from_zero=from_zero)
    assert 2 <= len(axis.ticks) <= 9
    assert axis.ticks == sorted(set(axis.ticks))
    slack = 1e-6 * (axis.high - axis.low)
    for value in values:
        assert axis.low - slack <= value <= axis.high + slack
        assert -1e-3 <= axis.at(value) <= 100 + 1e-3
    if from_zero and values and min(values) >= 0:
        assert axis.low == 0


@given(st.lists(st.floats(1e-30, 1e30), max_size=20))
def test_powers_of_ten_are_around_all_values(values: list[float]) -> None:
    axis = log_axis(values, 100, 0)
    assert all(axis.low * 0.999 <= value <= axis.high * 1.001 for value in values)
    assert 2 <= len(axis.ticks) <= 9
    assert all(math.isclose(math.log10(t), round(math.log10(t)), abs_tol=1e-9) for t in axis.ticks)


def test_nearly_equal_values_get_an_axis() -> None:
    axis = linear_axis([1e9, math.nextafter(1e9, 2e9)], 0, 1, from_zero=False)
    assert axis.ticks == sorted(set(axis.ticks))
    assert axis.low <= 1e9 < axis.high


def test_known_axes() -> None:
    assert linear_axis([28, 29], 0, 1, from_zero=False, whole=True).ticks == [28, 29]
    assert linear_axis([0, 11], 0, 1, whole=True).ticks == [0, 3, 6, 9, 12]
    assert linear_axis([3.0, 9.7], 0, 1).ticks == [0, 2, 4, 6, 8, 10]
    assert linear_axis([22.0, 29.0], 0, 1, from_zero=False).ticks == [22, 24, 26, 28, 30]
    assert linear_axis([], 0, 1).ticks == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    axis = log_axis([2.7, 112.0], 0, 30)
    assert axis.ticks == [1, 10, 100, 1000]
    assert [axis.at(x) for x in (1, 10, 1000)] == pytest.approx([0, 10, 30])
