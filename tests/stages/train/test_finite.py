"""Nothing that is not finite is saved, and a run that trained nothing is no success."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from molcli.config.sections import Recipe, StageConfig, TrainConfig
from molcli.errors import MolError
from molcli.stages.train import train
from molcli.stages.train.nonfinite import first_nonfinite
from molcli.stages.train.objective import PredictionObjective

SETTINGS = TrainConfig(
    tokens=6 * 2 * 16,
    context_length=16,
    batch_size=2,
    checkpoint_every=1,
    log_every=1,
    precision="fp32",
)
Make, Corpus = Callable[..., Path], Callable[..., str]


def recipe(**settings: Any) -> Recipe:
    return Recipe(train=replace(SETTINGS, **settings))


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("kind", "words", "lower"),
    [
        ("weight", "the weights model.embed_tokens.weight are", "train.learning_rate"),
        ("exp_avg_sq", "the mean squared gradient of model.embed_tokens.weight are", "clip_norm"),
    ],
)
def test_a_state_that_overflows_is_not_saved_and_the_last_good_ones_stay(
    tiny_mol: Make,
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    words: str,
    lower: str,
) -> None:
    """The fourth step's gradients are finite; one value of what it leaves is not."""
    real, calls = torch.optim.AdamW.step, []

    def overflow(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
        done = real(optimizer, *arguments)
        calls.append(done)
        if len(calls) == 4:
            parameter = optimizer.param_groups[0]["params"][0]
            tensor = parameter if kind == "weight" else optimizer.state[parameter][kind]
            tensor.data[3, 2] = math.inf
        return done

    checkpoint, data, out = tiny_mol(), corpus(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", overflow)
        with pytest.raises(MolError) as stopped:
            train(checkpoint, out, data, recipe())
    assert f"after step 4, {words} not finite" in stopped.value.found
    assert lower in stopped.value.hint
    assert str(out / "checkpoints" / "step-00000003") in stopped.value.hint
    assert checkpoints(out) == ["step-00000002", "step-00000003"]
    assert not (out / "config.json").exists()
    assert train(checkpoint, out, data, recipe(), resume=True).steps == 6


def test_a_model_that_overflows_is_not_written(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    """The weights stay finite until the last step: weight decay at such a rate overflows."""
    out = tmp_path / "out"
    one = recipe(tokens=2 * 16, checkpoint_every=0, learning_rate=1e30, weight_decay=1e30)
    with pytest.raises(MolError, match=r"after step 1, the weights .* are not finite") as stopped:
        train(tiny_mol(), out, corpus(), one)
    assert "no checkpoint was written yet" in stopped.value.hint
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "train.html"]


def test_weights_too_large_for_their_stored_dtype_are_not_written(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    """Finite in float32, in which they are trained, and infinite in float16."""
    out = tmp_path / "out"
    one = recipe(tokens=2 * 16, checkpoint_every=0, learning_rate=1e6)
    with pytest.raises(MolError, match=r"the trained weights .* are too large for float16"):
        train(tiny_mol(dtype=torch.float16), out, corpus(), one)
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "train.html"]


@pytest.mark.parametrize("every", [0, 1])
def test_a_run_whose_steps_were_all_skipped_is_no_success(
    tiny_mol: Make,
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
) -> None:
    """Nor is it one when it is resumed after its last step."""
    poison(monkeypatch, set(range(6)))
    checkpoint, data, out = tiny_mol(), corpus(), tmp_path / "out"
    settings = recipe(checkpoint_every=every)
    # Without checkpoints, a resumed run begins again.
    for resume in (False, True) if every else (False,):
        with pytest.raises(MolError, match="all 6 steps of stage 0 pretrain were skipped"):
            train(checkpoint, out, data, settings, resume=resume)
        assert not (out / "config.json").exists()


def test_a_stage_whose_steps_were_all_skipped_is_no_success(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {1, 3, 4, 5})
    stages = [StageConfig("pretrain", tokens=n * 2 * 16) for n in (3, 3)]
    with pytest.raises(MolError, match="all 3 steps of stage 1 pretrain") as stopped:
        train(tiny_mol(), tmp_path / "out", corpus(), recipe(stages=stages))
    assert "`train.stages.1.learning_rate`" in stopped.value.hint


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the gradients of these steps not finite."""
    real, calls = PredictionObjective.backward, []

    def backward(self: PredictionObjective, *arguments: Any) -> torch.Tensor:
        means = real(self, *arguments)
        if len(calls) in steps:
            next(p for p in self.student.parameters() if p.grad is not None).grad[0] = math.nan
        calls.append(means)
        return means

    monkeypatch.setattr(PredictionObjective, "backward", backward)


def test_the_log_has_null_where_a_mean_is_not_finite(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = PredictionObjective.backward, []

    def overflow(self: PredictionObjective, *arguments: Any) -> torch.Tensor:
        calls.append(real(self, *arguments))
        return calls[-1] * (math.inf if len(calls) == 2 else 1)

    monkeypatch.setattr(PredictionObjective, "backward", overflow)
    train(tiny_mol(), tmp_path / "out", corpus(), recipe())

    def refuse(name: str) -> float:
        raise AssertionError(name)

    text = (tmp_path / "out" / "log.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [line["loss"] is None for line in lines] == [False, True] + [False] * 4
    assert [line["not_finite"] for line in lines] == [None, "the mean loss"] + [None] * 4


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "clip_norm", "kl_weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_recipe_of_a_program_is_checked_for_numbers_too(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path, name: str, value: float
) -> None:
    with pytest.raises(MolError, match=rf"`train.{name}` is {value}"):
        train(tiny_mol(), tmp_path / "out", corpus(), recipe(**{name: value}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_kind_of_tensor_is_looked_at(value: float) -> None:
    whole = {"a": torch.ones(3, 4), "b": torch.ones(2).bfloat16(), "c": torch.arange(3)}
    whole |= {"empty": torch.ones(0), "number": torch.tensor(1.0)}
    assert first_nonfinite(whole) == ""
    # A sum that overflows is no value that does.
    assert first_nonfinite({"large": torch.full((9,), 3e38)} | whole) == ""
    for name in ("a", "b", "number"):
        bad = whole[name].clone()
        bad.view(-1)[-1] = value
        assert first_nonfinite(whole | {name: bad}) == name
