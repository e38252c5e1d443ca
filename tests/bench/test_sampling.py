"""The sampling benchmark, on a tiny parent."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts
import sampling


def test_sampled_text_is_as_likely_as_the_parents_entropy_says(
    tiny_parent: Callable[..., Path],
) -> None:
    found = sampling.main(
        [str(tiny_parent("llama")), "--tokens", "6K", "--length", "24", "--checked", "300"]
    )
    assert found["equal_runs"] and found["tokens"] >= 6000
    error = found["standard_error"]
    assert found["negative_log_likelihood"] == pytest.approx(found["entropy"], abs=4 * error)
    assert found["entropy"] > 10 * error
