"""Training tiny models: it learns, and it survives being stopped."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from molcli.config.recipe import load_recipe
from molcli.config.sections import EvaluateConfig, Recipe, TrainConfig
from molcli.errors import MolError
from molcli.families.parent import open_parent
from molcli.stages.evaluate import evaluate
from molcli.stages.train import train
from molcli.stages.train.objective import PredictionObjective

Make = Callable[..., Path]
Corpus = Callable[..., str]
TINY_PARENT = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=32)


def recipe(**settings: Any) -> Recipe:
    """Eight steps of four rows of 32, checkpoints every third."""
    tiny: dict[str, Any] = {
        "tokens": 8 * 4 * 32,
        "context_length": 32,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
        "new_learning_rate": 1e-2,
        "checkpoint_every": 3,
        "log_every": 2,
        "precision": "fp32",
    }
    return replace(Recipe(), train=TrainConfig(**(tiny | settings)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def log_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class Stopped(Exception):
    """Stands in for a kill: nothing in the run catches it."""


def stop_after(tokens: int) -> Callable[..., None]:
    def progress(done: int, total: int | None, note: str = "") -> None:
        if note != "" and done >= tokens:
            raise Stopped

    return progress


def test_text_is_learned(tiny_mol: Make, corpus: Corpus, tmp_path: Path) -> None:
    checkpoint, data, out = tiny_mol(), corpus(), tmp_path / "out"
    (checkpoint / "receipt.json").write_text('{"from": "upcycle"}')
    settings = recipe(tokens=60 * 4 * 32, checkpoint_every=0)
    result = train(checkpoint, out, data, settings)

    lines = log_lines(out)
    assert [line["step"] for line in lines] == list(range(2, 61, 2))
    assert lines[-1]["ce"] < 0.5 * lines[0]["ce"]
    assert lines[-1]["loss"] == result.loss
    assert lines[-1]["kl"] is None
    assert result.tokens == lines[-1]["tokens"] == 60 * 4 * 32
    assert result.steps == 60
    assert result.skipped == 0
    assert result.tokens_per_second > 0
    heldout = corpus("heldout.jsonl", documents=7)
    before, after = (
        evaluate(folder, None, heldout, EvaluateConfig(context_length=32)).ce
        for folder in (checkpoint, out)
    )
    assert after < 0.5 * before

    saved = replace(settings, train=replace(settings.train, data=data))
    assert load_recipe(out / "recipe.yaml") == saved
    assert json.loads((out / "receipt.json").read_text()) == {"from": "upcycle"}
    assert not (out / "checkpoints").exists()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=4).shape[1] > 3


def test_the_parents_predictions_are_learned(
    tiny_mol: Make, tiny_parent: Make, corpus: Corpus, tmp_path: Path
) -> None:
    checkpoint, data = tiny_mol(), corpus()
    parent = open_parent(tiny_parent("llama", **TINY_PARENT))
    train(checkpoint, tmp_path / "out", data, recipe(tokens=40 * 4 * 32), parent)
    before, after = (
        evaluate(folder, parent, data, EvaluateConfig(context_length=32))
        for folder in (checkpoint, tmp_path / "out")
    )
    assert before.kl is not None
    assert after.kl is not None
    assert after.kl < 0.7 * before.kl
    first, last = log_lines(tmp_path / "out")[0], log_lines(tmp_path / "out")[-1]
    assert last["kl"] < first["kl"] == pytest.approx(before.kl, rel=0.3)


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_a_stopped_run_ends_as_an_unstopped_one(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path, stop: int
) -> None:
    checkpoint, data = tiny_mol(), corpus()
    train(checkpoint, tmp_path / "whole", data, recipe(log_every=1))

    out = tmp_path / "stopped"
    with pytest.raises(Stopped):
        train(checkpoint, out, data, recipe(log_every=1), progress=stop_after(stop * 4 * 32))
    assert not (out / "config.json").exists()
    (out / "checkpoints").mkdir(exist_ok=True)
    (out / "checkpoints" / ".step-00000006.partial").mkdir()  # of a kill while writing
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 9')
    result = train(checkpoint, out, data, recipe(log_every=1), resume=True)

    assert result.steps == 8
    whole, resumed = weights(tmp_path / "whole"), weights(out)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for ours, theirs in zip(log_lines(out), log_lines(tmp_path / "whole"), strict=True):
        for name in ("step", "tokens", "loss", "balance", "learning_rate", "gradient_norm"):
            assert ours[name] == theirs[name]
    kept = [folder.name for folder in sorted((out / "checkpoints").glob("step-*"))]
    assert kept == ["step-00000003", "step-00000006"]


def test_a_mixture_is_resumed_and_its_passes_are_logged(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    """Half of 32 rows from 2 rows, half from 31: the first is repeated, the second is not."""
    checkpoint, out = tiny_mol(), tmp_path / "out"
    small, large = corpus("a.jsonl", documents=3), corpus("b.jsonl", documents=40)
    mixed = {small: 1.0, large: 1.0}
    train(checkpoint, tmp_path / "whole", mixed, recipe())
    with pytest.raises(Stopped):
        train(checkpoint, out, mixed, recipe(), progress=stop_after(5 * 4 * 32))
    with pytest.raises(MolError, match="the data was another one"):
        train(checkpoint, out, {small: 1.0, large: 2.0}, recipe(), resume=True)
    notes: list[str] = []
    train(
        checkpoint, out, mixed, recipe(), resume=True, progress=lambda *said: notes.append(said[-1])
    )
    assert "8.0 passes over a.jsonl" in notes[-1] and "b.jsonl" not in notes[-1]
    assert log_lines(out)[-1]["passes"] == {small: 8.0, large: None}  # a part of b
    whole, resumed = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    saved = load_recipe(out / "recipe.yaml").train.data
    assert saved == mixed


def test_only_the_newest_two_checkpoints_stay(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    train(tiny_mol(), tmp_path / "out", corpus(), recipe(checkpoint_every=1))
    kept = sorted(folder.name for folder in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["step-00000007", "step-00000008"]


def test_another_run_is_not_resumed(tiny_mol: Make, corpus: Corpus, tmp_path: Path) -> None:
    checkpoint, data, out = tiny_mol(), corpus(), tmp_path / "out"
    with pytest.raises(Stopped):
        train(checkpoint, out, data, recipe(), progress=stop_after(5 * 4 * 32))
    for change, arguments in {
        "`train.learning_rate` was 0.01 and is 0.02": (
            checkpoint,
            data,
            recipe(learning_rate=2e-2),
        ),
        "the data was another one": (checkpoint, corpus("b.jsonl", documents=41), recipe()),
        "the checkpoint was another one": (tiny_mol("b", d_ff_thin=16), data, recipe()),
    }.items():
        folder, text, settings = arguments
        with pytest.raises(MolError, match=change):
            train(folder, out, text, settings, resume=True)
    moved = Path(data).rename(tmp_path / "moved.jsonl")
    assert train(checkpoint, out, str(moved), recipe(log_every=1), resume=True).steps == 8


def test_output_folders_in_use_are_refused(tiny_mol: Make, corpus: Corpus, tmp_path: Path) -> None:
    checkpoint, data, out = tiny_mol(), corpus(), tmp_path / "out"
    with pytest.raises(MolError, match="no run to resume"):
        train(checkpoint, out, data, recipe(), resume=True)
    out.mkdir()
    (out / "notes.txt").touch()
    with pytest.raises(MolError, match="not empty"):
        train(checkpoint, out, data, recipe())
    (out / "config.json").touch()
    with pytest.raises(MolError, match="finished model"):
        train(checkpoint, out, data, recipe(), resume=True)


def test_a_step_without_a_finite_gradient_is_skipped(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = PredictionObjective.backward, []

    def poisoned(self: PredictionObjective, *args: Any) -> torch.Tensor:
        means = real(self, *args)
        calls.append(means)
        if len(calls) == 3:
            next(p for p in self.student.parameters() if p.grad is not None).grad[0] = math.inf
            return means * math.nan
        return means

    monkeypatch.setattr(PredictionObjective, "backward", poisoned)
    result = train(tiny_mol(), tmp_path / "out", corpus(), recipe(log_every=1))
    assert (result.steps, result.skipped) == (8, 1)
    assert math.isfinite(result.loss)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out").values())
    skipped = log_lines(tmp_path / "out")[2]
    assert (skipped["loss"], skipped["gradient_norm"], skipped["skipped"]) == (None, None, 1)
    assert skipped["not_finite"] == "the gradient of model.embed_tokens.weight"
    assert [line["not_finite"] for line in log_lines(tmp_path / "out")].count(None) == 7


def test_micro_batches_add_up(tiny_mol: Make, corpus: Corpus, tmp_path: Path) -> None:
    """Their number changes nothing but the CV^2 loss, which is computed for each of them."""
    checkpoint, data = tiny_mol(), corpus()
    for size in (1, 4):
        settings = recipe(tokens=2 * 4 * 32, micro_batch_size=size)
        train(checkpoint, tmp_path / f"out{size}", data, settings)
    losses = [log_lines(tmp_path / f"out{size}")[-1] for size in (1, 4)]
    assert losses[0]["ce"] == pytest.approx(losses[1]["ce"], rel=1e-5)
    assert losses[0]["gradient_norm"] == pytest.approx(losses[1]["gradient_norm"], rel=1e-4)


def test_the_balance_loss_balances(tiny_mol: Make, corpus: Corpus, tmp_path: Path) -> None:
    ends = []
    for weight in (0.0, 1.0):
        out = tmp_path / f"out{weight}"
        settings = recipe(tokens=30 * 4 * 32, balance="loss", balance_weight=weight)
        train(tiny_mol(), out, corpus(), settings)
        ends.append(log_lines(out)[-1]["balance"])
    assert ends[1] < 0.5 * ends[0]


def test_bf16_trains_fp32_weights_and_writes_the_stored_dtype(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    checkpoint = tiny_mol(dtype=torch.bfloat16)
    stored = {name: tensor.dtype for name, tensor in weights(checkpoint).items()}
    settings = recipe(precision="bf16", learning_rate=1e-5, new_learning_rate=1e-5)
    train(checkpoint, tmp_path / "out", corpus(), settings)
    assert {name: tensor.dtype for name, tensor in weights(tmp_path / "out").items()} == stored
    folder = tmp_path / "out" / "checkpoints" / "step-00000006"
    state = torch.load(folder / "state.pt", weights_only=True)["model"]
    name = "model.layers.1.shared.thin_in"
    assert state[name].dtype == torch.float32
    assert not torch.equal(state[name], state[name].bfloat16().float())


def test_gradient_checkpointing_changes_nothing(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    checkpoint, data = tiny_mol(), corpus()
    for flag in (False, True):
        settings = recipe(gradient_checkpointing=flag, tokens=2 * 4 * 32)
        train(checkpoint, tmp_path / str(flag), data, settings)
    kept, recomputed = weights(tmp_path / "False"), weights(tmp_path / "True")
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_dense_layers_can_be_frozen(tiny_mol: Make, corpus: Corpus, tmp_path: Path) -> None:
    checkpoint = tiny_mol(
        layer_structures=["dense", "mixture", "dense"],
        layer_mixers=["attention", "attention", "attention"],
    )
    train(checkpoint, tmp_path / "out", corpus(), recipe(trainable="mol"))
    before, after = weights(checkpoint), weights(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert moved == {name for name in before if ".layers.1." in name}


def test_training_mol_layers_alone_needs_some(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    checkpoint = tiny_mol(layer_structures=["dense"] * 3, layer_mixers=["attention"] * 3)
    with pytest.raises(MolError, match=r"train.trainable. is mol, but all layers"):
        train(checkpoint, tmp_path / "out", corpus(), recipe(trainable="mol"))
    assert not (tmp_path / "out").exists()


def test_a_batch_that_does_not_divide_is_refused(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(MolError, match=r"batch_size. is 4, for 1 processes"):
        train(tiny_mol(), tmp_path / "out", corpus(), recipe(micro_batch_size=3))
    assert not (tmp_path / "out").exists()
