"""The log of a run as an HTML page."""

import json
from html import escape
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molcli.config.sections import StageConfig, TrainConfig
from molcli.report.training import MAX_POINTS, downsample, training_page

CONFIG = TrainConfig(stages=[StageConfig("align"), StageConfig("distill", temperature=2.0)])


def log(windows: int, layers: int = 3, **changes: Any) -> list[dict[str, Any]]:
    """The log of so many windows; the first tenth is alignment."""
    return [
        {
            "step": 10 * (i + 1),
            "tokens": 80_000 * (i + 1),
            "seconds": 2.0 * (i + 1),
            "stage": "0 align" if i < windows / 10 else "1 distill",
            "loss": 3.0 / (i + 1) ** 0.3,
            "ce": None if i < windows / 10 else 4.123 + 1 / (i + 1),
            "kl": None if i < windows / 10 else 3.0 / (i + 1) ** 0.3,
            "balance": 0.1 + 0.01 * (i % 7),
            "learning_rate": 1e-4,
            "gradient_norm": None if i == 3 else 1.0 + (i % 13) / 7,
            "tokens_per_second": 40_000.0,
            "mfu": None,
            "routing": {str(22 + n): [0.123, 1.789] for n in range(layers)},
            "skipped": 0,
            "not_finite": None,
            **changes,
        }
        for i in range(windows)
    ]


def test_the_page_shows_the_log() -> None:
    page = training_page(log(20), CONFIG)
    assert page.count("<svg") == 7 + 2  # no utilisation on this device; routing
    assert "200 steps, 1,600,000 tokens in 0.01 hours" in page
    assert "<td>0 align</td><td>20</td><td>160,000</td><td>3.000 → 2.437</td><td>–</td>" in page
    assert "<td>1 distill</td><td>180</td><td>1,440,000</td>" in page
    assert "4.456 → 4.173" in page
    assert "40,000" in page
    assert "million tokens of training" in page
    assert "darkest: 0.789" in page and "darkest: 0.877" in page
    assert all(f">{layer}</text>" in page for layer in (22, 23, 24))
    assert "temperature: 2.0" in page
    assert training_page(log(20, mfu=0.4), CONFIG).count("<svg") == 8 + 2
    assert "<script" not in page and "http" not in page


def test_missing_figures_are_omitted() -> None:
    assert "No step" in training_page([], CONFIG)
    one = training_page(log(1, routing=None, loss=None, gradient_norm=None), CONFIG)
    assert one.count("<svg") == 3  # balance, learning rate, tokens/s
    assert "Routing" not in one


def test_skipped_steps_are_listed_with_the_first_bad_value() -> None:
    place = "the output of <model>.layers.3"
    page = training_page(log(30, skipped=30, not_finite=place), CONFIG)
    assert page.count(escape(place)) == 12
    assert "18 more" in page
    assert "30 of them skipped" in page


@pytest.mark.parametrize("layers", [1, 32, 126])
def test_the_page_of_a_long_run_stays_small(layers: int) -> None:
    lines = log(2500, layers, mfu=0.41, not_finite="the loss")
    for number, line in enumerate(lines):
        line["stage"] = f"{number // 200} distill"
    assert len(training_page(lines, CONFIG).encode()) < 200_000
    assert len(json.dumps(lines[0])) < 500 + 24 * layers


@given(st.lists(st.floats(-1e6, 1e6), max_size=900), st.integers(2, MAX_POINTS))
def test_downsampling_keeps_order_and_extremes(heights: list[float], most: int) -> None:
    points = [(float(i), y) for i, y in enumerate(heights)]
    kept = downsample(points, most)
    assert len(kept) <= most
    assert kept == sorted(set(kept)) and set(kept) <= set(points)
    if heights:
        assert {min(heights), max(heights)} <= {y for _, y in kept}
