"""Stages planned from a model's size and a budget, and estimates of what they take."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from molcli.cli import main as command
from molcli.config.ranges import validate
from molcli.config.recipe import load_recipe
from molcli.config.sections import Recipe, StageConfig, TrainConfig
from molcli.config.stages import resolve
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.model import MoLConfig
from molcli.stages.train.batches import tokens_per_step
from molcli.stages.train.plan import Situation, estimate, launch_seconds, plan

SOFTMAX = MoLConfig(
    num_hidden_layers=2, layer_structures=["mixture"] * 2, layer_mixers=["attention"] * 2
)
DELTANET = MoLConfig(num_hidden_layers=2, max_position_embeddings=8192)


@given(
    tokens=st.integers(1, 10**11),
    deltanet=st.booleans(),
    has_parent=st.booleans(),
    converted=st.booleans(),
    ranks=st.sampled_from([1, 2, 8]),
)
def test_every_plan_is_a_valid_recipe_that_spends_the_budget(
    tokens: int, deltanet: bool, has_parent: bool, converted: bool, ranks: int
) -> None:
    model = DELTANET if deltanet else SOFTMAX
    situation = Situation(has_parent, converted, ranks)
    config = plan(TrainConfig(tokens=tokens), model, situation)
    validate(Recipe(train=config))
    stages = resolve(config, has_parent=has_parent)
    assert sum(stage.settings.tokens for stage in stages) == tokens
    for stage in stages:
        assert stage.settings.context_length <= model.max_position_embeddings
        rows, at_once = stage.settings.batch_size, stage.settings.micro_batch_size * ranks
        assert rows % at_once == 0 or rows < ranks
        # Two hundred steps, unless one row is too much.
        assert tokens_per_step(stage.settings) <= max(tokens // 200, stage.settings.context_length)
    kinds = [stage.kind for stage in stages]
    assert ("align" in kinds) == (has_parent and deltanet and tokens >= 10)
    assert kinds[-1] == ("distill" if has_parent else "pretrain")


def test_learning_rates_fall_with_size() -> None:
    small = MoLConfig(hidden_size=256, num_hidden_layers=2)
    large = MoLConfig(hidden_size=4096, num_hidden_layers=32, d_thin=1024, d_ff_thin=4096)
    config = TrainConfig(tokens=10**9)
    converted, fresh = Situation(True, True), Situation(False, False)
    assert plan(config, small, converted).learning_rate == 6e-4
    assert 5e-6 < plan(config, large, converted).learning_rate < 3e-5
    assert plan(config, small, fresh).learning_rate == 3e-4
    assert plan(TrainConfig(tokens=10**6), small, converted).learning_rate == 1e-4
    long = resolve(plan(config, DELTANET, converted), has_parent=True)
    assert [stage.kind for stage in long] == ["align", "distill", "distill"]
    assert long[-1].settings.context_length == 4096


def test_an_estimate_has_every_stage(tiny_mol: Callable[..., Path], dense_parent: Parent) -> None:
    config = TrainConfig(tokens=10_000, context_length=32)
    checkpoint = tiny_mol()
    one = estimate(checkpoint, config, None).stages[0]
    assert (one.stage.kind, one.steps, one.memory.parent) == ("pretrain", 20, 0)
    assert one.tokens_per_second > 0
    with_parent = estimate(checkpoint, config, dense_parent).stages[0]
    assert with_parent.flops > one.flops
    assert with_parent.memory.parent > 0
    frozen = estimate(checkpoint, TrainConfig(trainable="mol"), None).stages[0]
    assert frozen.memory.gradients == 4 * frozen.trainable < one.memory.gradients


def test_launching_takes_time_for_each_micro_batch_of_a_rank() -> None:
    settings = TrainConfig(batch_size=32, micro_batch_size=8)
    assert launch_seconds(settings, 30, 1) == 2 * launch_seconds(settings, 30, 2)
    assert launch_seconds(settings, 30, 4) == launch_seconds(settings, 30, 8) > 0


def test_an_estimate_refuses_what_training_refuses(tiny_mol: Callable[..., Path]) -> None:
    with pytest.raises(MolError, match=r"batch_size. is 16, for 3 processes"):
        estimate(tiny_mol(), TrainConfig(), None, ranks=3)


def molcli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["molcli", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_without_a_recipe_the_plan_is_printed_and_carried_out(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    dense_parent: Parent,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, out = tiny_mol(max_position_embeddings=16), tmp_path / "out"
    words = ["train", checkpoint, out, "--data", corpus(), "--parent", dense_parent.folder]
    words += ["--set", "train.tokens=320"]
    assert molcli(monkeypatch, *words, "--dry-run") == 0
    said = capsys.readouterr().out
    assert not out.exists()
    for word in ("0 align", "1 distill", "activations", "parent", "hours", "trainable", "repeats"):
        assert word in said
    assert molcli(monkeypatch, *words) == 0
    assert "Stages planned for 320 tokens" in capsys.readouterr().out
    ran = load_recipe(out / "recipe.yaml").train
    assert [stage.kind for stage in ran.stages or []] == ["align", "distill"]

    # With one setting of how to train, nothing is planned.
    words[2] = tmp_path / "plain"
    settings = ["--set", "train.context_length=16", "--set", "train.learning_rate=1e-3"]
    assert molcli(monkeypatch, *words, *settings) == 0
    assert "planned" not in capsys.readouterr().out
    assert load_recipe(tmp_path / "plain" / "recipe.yaml").train.stages is None


@pytest.mark.parametrize("kind", ["missing", "cut", "renamed", "resized"])
@pytest.mark.parametrize("whose", ["checkpoint", "parent"])
def test_a_dry_run_refuses_weights_that_a_run_would(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    dense_parent: Parent,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    whose: str,
) -> None:
    checkpoint = tiny_mol()
    file = (checkpoint if whose == "checkpoint" else dense_parent.folder) / "model.safetensors"
    tensors = load_file(file)
    if kind == "missing":  # a shard of two
        index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
        (file.parent / "model.safetensors.index.json").write_text(json.dumps(index))
        file.unlink()
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif kind == "renamed":
        tensors["model.norms.weight"] = tensors.pop("model.norm.weight")
        save_file(tensors, file)
    else:
        tensors["model.norm.weight"] = torch.ones(5)
        save_file(tensors, file)
    words = ["train", checkpoint, tmp_path / "out", "--data", corpus()]
    words += ["--parent", dense_parent.folder, "--set", "train.context_length=16", "--dry-run"]
    assert molcli(monkeypatch, *words) == 2
    said = capsys.readouterr()
    assert "error: " in said.err and "hours" not in said.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(data="gone.jsonl"), "does not exist"),
        (dict(data="folder"), "tokens.json"),
        (dict(logits="gone"), "not a cache of logits"),
        (dict(start_top_k=99), "start_top_k"),
        (dict(stages=[StageConfig("align")]), "learns from the parent"),
        (dict(learning_rate=float("nan")), "learning_rate. is nan"),
    ],
)
def test_an_estimate_opens_what_training_reads(
    tiny_mol: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    said: str,
) -> None:
    checkpoint = tiny_mol()
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    config = TrainConfig(tokens=10_000, context_length=32, **settings)
    with pytest.raises(MolError, match=said):
        estimate(checkpoint, config, None)
