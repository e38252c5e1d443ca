"""Groups of blocks that are fitted to what the others leave."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molcli.fitting.layer import fit_layer
from molcli.fitting.thin_blocks import BlockGroup


@pytest.mark.parametrize("shape", [(5, 1, 2), (4, 2, 1), (4, 0, 2)])
def test_refitting_reduces_the_error(
    shape: tuple[int, int, int],
    tiny_parent: Callable[..., Path],
    convert: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the text that blocks are fitted to."""
    parent = tiny_parent("llama", num_hidden_layers=1)
    options = dict(zip(("num_blocks", "num_shared_blocks", "top_k"), shape, strict=True))
    twice = convert(parent, **options).receipt["layers"][0]["residual_error_fit"]
    monkeypatch.setattr(BlockGroup, "refit_writing", lambda *args: None)
    once = convert(parent, **options).receipt["layers"][0]["residual_error_fit"]
    assert twice < 0.98 * once


@pytest.mark.parametrize("mixer", ["none", "all"])
def test_the_residual_of_a_fit_is_the_output_of_its_layer(
    mixer: str,
    tiny_parent: Callable[..., Path],
    convert: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Although each group's output was subtracted from the error, refitted and added again."""
    errors = []

    def checked(*args: Any, **kwargs: Any) -> Any:
        residuals = args[4]
        before = residuals.student.clone()
        fitted = fit_layer(*args, **kwargs)
        given = residuals.chunks.run(fitted.layer, before)
        errors.append(((given - residuals.student).norm() / given.norm()).item())
        return fitted

    monkeypatch.setattr("molcli.stages.upcycle.run.fit_layer", checked)
    convert(tiny_parent("llama"), gated_deltanet=mixer)
    assert errors and all(error < 1e-5 for error in errors)
