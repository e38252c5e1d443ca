"""Groups and schedule."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molcli.config.sections import TrainConfig
from molcli.model.checkpoint import open_checkpoint
from molcli.stages.train.optimizer import (
    has_decay,
    is_new,
    learning_rate_ratio,
    make_optimizer,
    set_learning_rates,
)

NEW = (
    "thin_in",
    "thin_out",
    "a_proj",
    "b_proj",
    "g_proj",
    "q_conv",
    "k_conv",
    "v_conv",
    "o_norm",
    "A_log",
    "dt_bias",
)


def test_every_parameter_is_in_the_group_it_belongs_to(tiny_mol: Callable[..., Path]) -> None:
    model = open_checkpoint(tiny_mol(qk_norm=True), torch.device("cpu"))
    config = TrainConfig(learning_rate=1e-3, new_learning_rate=5e-3, weight_decay=0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, config)
    seen: list[str] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            last = name.split(".")[-1]
            single = last in ("A_log", "dt_bias") or last.endswith(("norm", "bias"))
            single = single or name == "model.norm.weight"
            assert group["weight_decay"] == (0.0 if single else 0.3), name
            new = last in NEW
            assert group["peak"] == (5e-3 if new or "router" in name else 1e-3), name
    assert sorted(seen) == sorted(names.values())
    set_learning_rates(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4, 2.5e-3}


@pytest.mark.parametrize(
    ("name", "new", "decay"),
    [
        ("model.embed_tokens.weight", False, True),
        ("model.norm.weight", False, False),
        ("model.layers.0.router.weight", True, True),
        ("model.layers.0.routed.thin_in", True, True),
        ("model.layers.0.routed.block.input_norm", False, False),
        ("model.layers.0.routed.block.mixer.q_bias", False, False),
        ("model.layers.0.routed.block.mixer.o_norm", True, False),
        ("model.layers.0.routed.block.mixer.k_conv", True, True),
        ("model.layers.0.routed.block.mixer.A_log", True, False),
        ("model.layers.0.routed.block.mixer.dt_bias", True, False),
    ],
)
def test_names_decide(name: str, new: bool, decay: bool) -> None:
    assert (is_new(name), has_decay(name)) == (new, decay)


@given(
    steps=st.integers(1, 200),
    warmup=st.floats(0, 1),
    low=st.floats(0, 1),
)
def test_schedule_rises_then_falls_to_its_floor(steps: int, warmup: float, low: float) -> None:
    config = TrainConfig(warmup_fraction=warmup, min_learning_rate_ratio=low)
    ratios = [learning_rate_ratio(step, steps, config) for step in range(steps)]
    peak = ratios.index(max(ratios))
    assert ratios[: peak + 1] == sorted(ratios[: peak + 1])
    assert ratios[peak:] == sorted(ratios[peak:], reverse=True)
    assert ratios[0] > 0 or low == 0
    assert max(ratios) <= 1 + 1e-12
    assert ratios[-1] == pytest.approx(low) or peak == steps - 1
