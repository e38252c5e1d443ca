"""Runs of several stages."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from molcli.config.recipe import load_recipe
from molcli.config.sections import Recipe, StageConfig, TrainConfig
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.stages.train import train
from molcli.stages.train.gradient_graph import MIN_TOKENS_TO_COMPILE, should_compile

STAGES = [
    StageConfig("align", tokens=4 * 2 * 16, new_learning_rate=1e-2, learning_rate=1e-2),
    StageConfig("distill", temperature=2.0, ce_weight=0.1),
    StageConfig("pretrain", tokens=2 * 24, context_length=24, batch_size=1, micro_batch_size=1),
]


def recipe(**settings: Any) -> Recipe:
    """Four, three and two steps."""
    tiny: dict[str, Any] = {
        "tokens": 3 * 2 * 16,
        "context_length": 16,
        "batch_size": 2,
        "micro_batch_size": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "precision": "fp32",
        "stages": STAGES,
    }
    return replace(Recipe(), train=TrainConfig(**(tiny | settings)))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class Stopped(Exception):
    pass


def stop_after(step: int) -> Callable[..., None]:
    calls: list[int] = []

    def progress(done: int, total: int | None, note: str = "") -> None:
        if note:
            calls.append(done)
            if len(calls) == step:
                raise Stopped

    return progress


def test_stages_run_in_order_and_each_is_resumed_exactly(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    dense_parent: Parent,
    tmp_path: Path,
) -> None:
    checkpoint, data = tiny_mol(), corpus()
    whole, result = tmp_path / "whole", None
    result = train(checkpoint, whole, data, recipe(), dense_parent)
    assert (result.steps, result.tokens) == (9, 7 * 32 + 2 * 24)
    log = lines(whole)
    kinds = ["0 align"] * 4 + ["1 distill"] * 3 + ["2 pretrain"] * 2
    assert [line["stage"] for line in log] == kinds
    assert [line["kl"] is None for line in log] == [True] * 4 + [False] * 3 + [True] * 2
    assert [line["ce"] is None for line in log] == [True] * 4 + [False] * 5
    assert log[3]["loss"] < 0.9 * log[0]["loss"]
    assert log[4]["loss"] > log[4]["kl"]  # four times a KL at 2, and some cross-entropy
    # Each stage warms up on its own: the first of four, three, two steps is at its peak.
    assert [log[i]["learning_rate"] for i in (0, 4, 7)] == [1e-2, 1e-4, 1e-4]
    saved = load_recipe(whole / "recipe.yaml").train
    assert saved == replace(recipe().train, data=data)

    ends = load_file(whole / "model.safetensors")
    for stop in (1, 4, 5, 8):  # in each stage, and at the end of the first
        out = tmp_path / f"stopped{stop}"
        with pytest.raises(Stopped):
            train(checkpoint, out, data, recipe(), dense_parent, progress=stop_after(stop))
        train(checkpoint, out, data, recipe(), dense_parent, resume=True)
        resumed = load_file(out / "model.safetensors")
        assert all(torch.equal(resumed[name], ends[name]) for name in ends), stop
        assert [line["stage"] for line in lines(out)] == kinds


def test_alignment_trains_converted_layers_alone(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    dense_parent: Parent,
    tmp_path: Path,
) -> None:
    checkpoint, out = tiny_mol(), tmp_path / "out"
    train(checkpoint, out, corpus(), recipe(stages=STAGES[:1]), dense_parent)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, out))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[2] for name in moved} == {"1", "2"}


def test_data_that_vanished_is_named_and_costs_nothing(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    dense_parent: Parent,
    tmp_path: Path,
) -> None:
    """The file of the last stage is there at the start, gone when its turn comes, and restored."""
    checkpoint, data, late = tiny_mol(), corpus(), Path(corpus("late.jsonl", documents=39))
    stages = [*STAGES[:1], replace(STAGES[2], data=str(late))]
    settings = recipe(stages=stages, checkpoint_every=100)
    train(checkpoint, tmp_path / "whole", data, settings, dense_parent)
    kept, out = late.read_text(), tmp_path / "out"

    def vanish(done: int, total: int | None, note: str = "") -> None:
        late.unlink(missing_ok=True)

    with pytest.raises(MolError, match=r"late.jsonl. does not exist"):
        train(checkpoint, out, data, settings, dense_parent, progress=vanish)
    with pytest.raises(MolError, match=r"late.jsonl. does not exist"):  # now before any work
        train(checkpoint, tmp_path / "other", data, settings, dense_parent)
    assert not (tmp_path / "other").exists()
    late.write_text(kept)
    train(checkpoint, out, data, settings, dense_parent, resume=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_changed_stage_is_another_run(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    dense_parent: Parent,
    tmp_path: Path,
) -> None:
    checkpoint, data, out = tiny_mol(), corpus(), tmp_path / "out"
    with pytest.raises(Stopped):
        train(checkpoint, out, data, recipe(), dense_parent, progress=stop_after(3))
    changed = recipe(stages=[STAGES[0], replace(STAGES[1], temperature=3.0), STAGES[2]])
    with pytest.raises(MolError, match=r"`train.stages.1.temperature` was 2.0 and is 3.0"):
        train(checkpoint, out, data, changed, dense_parent, resume=True)
    with pytest.raises(MolError, match=r"`train.stages.2.kind` was pretrain and is None"):
        train(checkpoint, out, data, recipe(stages=STAGES[:2]), dense_parent, resume=True)


def test_a_stage_that_needs_a_parent_says_so(
    tiny_mol: Callable[..., Path], corpus: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(MolError, match="align learns from the parent"):
        train(tiny_mol(), tmp_path / "out", corpus(), recipe())
    with pytest.raises(MolError, match="pretrain has no data"):
        train(tiny_mol(), tmp_path / "out", None, recipe(stages=STAGES[2:]))


def test_compiling_pays_by_the_tokens_of_all_stages() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert should_compile(TrainConfig(), MIN_TOKENS_TO_COMPILE, gpu)
    assert not should_compile(TrainConfig(), MIN_TOKENS_TO_COMPILE - 1, gpu)
    assert not should_compile(TrainConfig(), MIN_TOKENS_TO_COMPILE, cpu)
    # Every number of blocks would be compiled again.
    assert not should_compile(TrainConfig(start_top_k=4), MIN_TOKENS_TO_COMPILE, gpu)
    assert should_compile(TrainConfig(compile=True, start_top_k=4), 1, cpu)
    assert not should_compile(TrainConfig(compile=False), MIN_TOKENS_TO_COMPILE, gpu)
