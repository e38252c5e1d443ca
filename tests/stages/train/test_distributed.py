"""Which processes keep weights and gradients whole, and when they exchange them."""

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
from molcli.stages.train.distributed import uses_optimizer_sharding

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("sharding", "ranks", "whole"),
    [("optimizer", 2, True), ("optimizer", 1, False), ("full", 2, False), ("auto", 2, False)],
)
def test_the_recipe_decides_and_one_process_shares_nothing(
    sharding: str, ranks: int, whole: bool
) -> None:
    config = TrainConfig(sharding=sharding)  # type: ignore[arg-type]
    assert uses_optimizer_sharding(config, MoLConfig(), CPU, ranks) is whole


@pytest.mark.parametrize(("share", "whole"), [(0.3, True), (0.4, False)])
def test_auto_asks_for_a_third_of_a_gpu(
    share: float, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and gradients are 8 bytes a parameter."""
    model = MoLConfig()
    about = SimpleNamespace(total_memory=8 * count_parameters(model).total / share)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    assert uses_optimizer_sharding(TrainConfig(), model, GPU, 2) is whole


def test_the_last_micro_batch_of_a_step_exchanges(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What one process would tell the others."""
    told = []

    def set_gradient_sync(student: nn.Module, *, now: bool) -> None:
        told.append(now)

    monkeypatch.setattr(loop, "uses_optimizer_sharding", lambda *given: True)
    monkeypatch.setattr(objective, "set_gradient_sync", set_gradient_sync)
    steps = TrainConfig(tokens=2 * 6 * 16, context_length=16, batch_size=6, micro_batch_size=2)
    train(tiny_mol(), tmp_path / "out", corpus(), Recipe(train=steps))
    assert told == [False, False, True] * 2
