"""Values that are not finite: where they are found, and when a run stops."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from molcli.config.sections import Recipe, StageConfig, TrainConfig
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import open_checkpoint
from molcli.stages.train import train
from molcli.stages.train.nonfinite import find_nonfinite
from molcli.stages.train.objective import PredictionObjective

IDS = torch.arange(8)[None]


@pytest.fixture
def model(tiny_mol: Callable[..., Path]) -> MoLForCausalLM:
    return open_checkpoint(tiny_mol(), torch.device("cpu"))


def found(model: MoLForCausalLM) -> str:
    def losses_are_finite() -> bool:
        return bool(model(IDS).logits.isfinite().all())

    return find_nonfinite(model, losses_are_finite, Accelerator(cpu=True))


def test_a_weight_is_named_before_its_effects(model: MoLForCausalLM) -> None:
    model.model.layers[1].shared.thin_in.data[0, 0, 0] = math.nan
    assert found(model) == "the weights model.layers.1.shared.thin_in"


def test_the_first_module_whose_output_overflows_is_named(model: MoLForCausalLM) -> None:
    """Finite weights, finite input: the product of the two is too large in this layer."""
    model.model.layers[2].routed.block.mlp.up_proj.data.fill_(1e38)
    assert found(model) == "the output of model.layers.2.routed.block.mlp"
    assert not model.model.layers[2].routed.block.mlp._forward_hooks


def test_the_loss_and_then_the_gradient_nearest_to_it_are_named(model: MoLForCausalLM) -> None:
    assert find_nonfinite(model, lambda: False, Accelerator(cpu=True)) == "the loss"
    for name in ("model.embed_tokens.weight", "model.layers.1.shared.thin_in"):
        parameter = model.get_parameter(name)
        parameter.grad = torch.full_like(parameter, math.inf)
    assert found(model) == "the gradient of model.layers.1.shared.thin_in"
    model.zero_grad()
    assert found(model) == "the sum of squared gradients"


def test_too_many_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = PredictionObjective.backward, []

    def poisoned(self: PredictionObjective, *arguments: Any) -> torch.Tensor:
        means = real(self, *arguments)
        calls.append(len(calls))
        if calls[-1] in (1, 2, 4, 5, 6):  # two in a row, and after a good step three
            next(p for p in self.student.parameters() if p.grad is not None).grad[0] = math.nan
        return means

    monkeypatch.setattr(PredictionObjective, "backward", poisoned)
    tiny = TrainConfig(
        tokens=9 * 4 * 32,
        context_length=32,
        batch_size=4,
        checkpoint_every=1,
        max_skipped=3,
        precision="fp32",
    )
    recipe, out = replace(Recipe(), train=tiny), tmp_path / "out"
    with pytest.raises(MolError) as stopped:
        train(tiny_mol(), out, corpus(), recipe)
    assert len(calls) == 7
    assert "3 steps in a row" in stopped.value.found
    assert "the gradient of model.embed_tokens.weight" in stopped.value.found
    assert str(out / "checkpoints" / "step-00000007") in stopped.value.hint
    assert not (out / "config.json").exists()


def test_an_overflow_is_traced_in_every_kind_of_stage(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    dense_parent: Parent,
    tmp_path: Path,
) -> None:
    checkpoint, data = tiny_mol(), corpus()
    model = open_checkpoint(checkpoint, torch.device("cpu"))
    model.model.layers[2].routed.block.mlp.up_proj.data.fill_(1e38)
    model.save_pretrained(checkpoint)
    for kind in ("align", "distill", "pretrain"):
        tiny = TrainConfig(
            context_length=16, batch_size=4, max_skipped=2, stages=[StageConfig(kind, tokens=640)]
        )
        where = (
            r"2 steps in a row .* up to step 2; .* the output of model.layers.2.routed.block.mlp"
        )
        with pytest.raises(MolError, match=where) as stopped:
            train(checkpoint, tmp_path / kind, data, Recipe(train=tiny), dense_parent)
        assert "no checkpoint was written yet" in stopped.value.hint
