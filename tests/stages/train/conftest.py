"""A parent whose layers the tiny Mixture of Layers model stands for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from molcli.families.parent import Parent, open_parent
from tests.stages.train.stopped_run import SMALL, Run


@pytest.fixture
def dense_parent(tiny_parent: Callable[..., Path]) -> Parent:
    """Three layers, width 32, heads of 8: as wide and deep as `tiny_mol`."""
    shape = dict(num_hidden_layers=3, hidden_size=32, head_dim=8, intermediate_size=48)
    return open_parent(tiny_parent("llama", **shape))


@pytest.fixture
def run(tiny_mol: Callable[..., Path], corpus: Callable[..., str], tmp_path: Path) -> Run:
    return Run(tiny_mol(**SMALL), corpus(), tmp_path / "out")
