"""The optimiser's step: clipped as torch clips, and skipped where the norm is not finite."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molcli.config.sections import Recipe, TrainConfig
from molcli.stages.train import loop, train
from molcli.stages.train.objective import PredictionObjective
from molcli.stages.train.optimizer import update

ONE: Any = SimpleNamespace(num_processes=1)
KINDS = [("cpu", False), ("cpu", True), pytest.param("cuda", True, marks=pytest.mark.gpu)]


def small(device: str, *, fused: bool) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 33), nn.Linear(33, 5)).to(device)
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 1e-2}]
    return model, torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1, fused=fused)


def set_gradients(model: nn.Module, norm: float, seed: int) -> None:
    """The same ones on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    size = torch.cat([x.flatten() for x in drawn]).norm()
    for parameter, gradient in zip(model.parameters(), drawn, strict=True):
        parameter.grad = (gradient * norm / size).to(parameter.device)


def after(device: str, *, fused: bool, norms: list[float], bound: float) -> list[Tensor]:
    """Weights, moments and step counts."""
    model, optimizer = small(device, fused=fused)
    for seed, norm in enumerate(norms):
        set_gradients(model, norm, seed)
        found, finite = update(model, optimizer, bound, ONE)
        assert finite()
        assert float(found) == pytest.approx(norm, rel=1e-5)  # the one before clipping
    moments = [x.cpu() for p in model.parameters() for x in optimizer.state[p].values()]
    return [p.detach().cpu() for p in model.parameters()] + moments


@pytest.mark.parametrize(("device", "fused"), KINDS)
def test_gradients_are_clipped_as_torch_clips_them(device: str, fused: bool) -> None:
    """One norm is above the bound, one below: moments mix them, so a missing factor would show."""
    norms = [30.0, 0.5, 7.0]
    model, optimizer = small("cpu", fused=False)
    for seed, norm in enumerate(norms):
        set_gradients(model, norm, seed)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
    moments = [x for p in model.parameters() for x in optimizer.state[p].values()]
    wanted = [p.detach() for p in model.parameters()] + moments
    found = after(device, fused=fused, norms=norms, bound=2.0)
    exact = {"rtol": 0.0, "atol": 0.0} if not fused else {"rtol": 1e-5, "atol": 1e-7}
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, right, **exact)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("device", "fused"), KINDS)
def test_a_norm_that_is_not_finite_changes_nothing(device: str, fused: bool, value: float) -> None:
    model, optimizer = small(device, fused=fused)
    set_gradients(model, 3.0, seed=0)
    update(model, optimizer, 1.0, ONE)
    set_gradients(model, 3.0, seed=1)
    poisoned = next(model.parameters()).grad
    assert poisoned is not None
    poisoned[0, 0] = value

    def everything() -> list[Tensor]:
        kept = [x for state in optimizer.state_dict()["state"].values() for x in state.values()]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return copy.deepcopy([*model.state_dict().values(), *kept, *gradients])

    before = everything()
    norm, finite = update(model, optimizer, 1.0, ONE)
    assert not finite() and not norm.isfinite()
    for now, then in zip(everything(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    set_gradients(model, 3.0, seed=2)
    _, finite = update(model, optimizer, 1.0, ONE)
    assert finite() and not torch.equal(everything()[0], before[0])  # the next step is applied


@pytest.mark.gpu
def test_an_update_does_not_synchronise_with_the_gpu() -> None:
    """Nor does the first step, which makes the moments."""
    model, optimizer = small("cuda", fused=True)
    for seed in range(3):
        set_gradients(model, 3.0, seed)
        torch.cuda.set_sync_debug_mode("error")
        try:
            _, finite = update(model, optimizer, 1.0, ONE)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert finite()


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_no_trace(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fused: bool,
) -> None:
    """The second step changes neither the checkpoint (weights, biases, moments, step counts) nor
    the logged loss and router loads. Runs on a GPU if there is one."""
    real, calls = PredictionObjective.backward, []

    def poisoned(self: PredictionObjective, *arguments: Any) -> Tensor:
        means = real(self, *arguments)
        calls.append(len(calls))
        if calls[-1] == 1:
            gradient = self.student.model.get_parameter("model.layers.1.shared.thin_in").grad
            assert gradient is not None
            gradient[0] = math.nan
            means *= math.nan
        return means

    made = loop.make_optimizer

    def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
        optimizer = made(model, config)
        for group in optimizer.param_groups:
            group["fused"] = fused or group["fused"]
        return optimizer

    monkeypatch.setattr(PredictionObjective, "backward", poisoned)
    monkeypatch.setattr(loop, "make_optimizer", make_optimizer)
    tiny = TrainConfig(
        tokens=2 * 4 * 32,
        context_length=32,
        batch_size=4,
        checkpoint_every=1,
        log_every=1,
        precision="fp32",
    )
    out = tmp_path / "out"
    train(tiny_mol(), out, corpus(), replace(Recipe(), train=tiny))
    first, second = (
        torch.load(out / "checkpoints" / f"step-0000000{n}" / "state.pt", weights_only=True)
        for n in (1, 2)
    )
    biases = [name for name in first["model"] if name.endswith("correction_bias")]
    assert biases and all(first["model"][name].any() for name in biases)
    for name, value in first["model"].items():
        assert torch.equal(second["model"][name], value), name
    assert len(first["optimizer"]["state"]) > 0
    for number, kept in first["optimizer"]["state"].items():
        assert kept["step"] == 1
        for name, value in kept.items():
            assert torch.equal(second["optimizer"]["state"][number][name], value), name
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1]
    assert lines[0]["routing"] is not None and lines[0]["not_finite"] is None
    for name in ("loss", "ce", "gradient_norm", "routing"):
        assert lines[1][name] is None, name
    assert lines[1]["not_finite"] == "the gradient of model.layers.1.shared.thin_in"
