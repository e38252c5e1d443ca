"""How weights are sharded, and when gradients are reduced over ranks."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from molcli.config.sections import Recipe, TrainConfig
from molcli.estimate.parameters import count_parameters
from molcli.model import MoLConfig
from molcli.stages.train import loop, objective, train
from molcli.stages.train.distributed import shard_dimension, uses_optimizer_sharding

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("sharding", "ranks", "expected"),
    [("optimizer", 2, True), ("optimizer", 1, False), ("full", 2, False), ("auto", 2, False)],
)
def test_the_recipe_decides_and_one_process_shards_nothing(
    sharding: str, ranks: int, expected: bool
) -> None:
    config = TrainConfig(sharding=sharding)  # type: ignore[arg-type]
    assert uses_optimizer_sharding(config, MoLConfig(), CPU, ranks) is expected


@pytest.mark.parametrize(("fraction", "expected"), [(0.3, True), (0.4, False)])
def test_auto_needs_weights_and_gradients_to_fit_in_a_third_of_a_gpu(
    fraction: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and gradients take 8 bytes for each parameter."""
    model = MoLConfig()
    properties = SimpleNamespace(total_memory=8 * count_parameters(model).total / fraction)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert uses_optimizer_sharding(TrainConfig(), model, GPU, 2) is expected


def test_only_the_last_micro_batch_of_a_step_reduces_gradients(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one process would call it; FSDP2 is not there."""
    calls = []

    def set_gradient_sync(student: nn.Module, *, now: bool) -> None:
        calls.append(now)

    monkeypatch.setattr(loop, "uses_optimizer_sharding", lambda *arguments: True)
    monkeypatch.setattr(objective, "set_gradient_sync", set_gradient_sync)
    steps = TrainConfig(tokens=2 * 6 * 16, context_length=16, batch_size=6, micro_batch_size=2)
    train(tiny_mol(), tmp_path / "out", corpus(), Recipe(train=steps))
    assert calls == [False, False, True] * 2


@pytest.mark.parametrize(
    "shape, ranks, dimension",
    [((1, 48, 32), 2, 1), ((14, 16, 32), 2, 0), ((14, 16, 32), 4, 1), ((5, 3), 2, 0)],
)
def test_weights_are_sharded_evenly_where_a_dimension_divides(
    shape: tuple[int, ...], ranks: int, dimension: int
) -> None:
    assert shard_dimension(torch.Size(shape), ranks) == dimension
