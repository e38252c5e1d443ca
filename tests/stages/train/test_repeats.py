"""Training on rows of which a part repeats itself."""

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
from molcli.config.stages import resolve
from molcli.data.logits import open_logits
from molcli.data.mixture import load_rows
from molcli.data.token_folder import write_token_folder
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.model.checkpoint import open_checkpoint
from molcli.stages.cache_logits import cache_logits
from molcli.stages.train import train
from tests.stages.train.stopped_run import Stopped

Make = Callable[..., Path]
Text = Callable[..., str]
VOCAB = 128


def recipe(**settings: Any) -> Recipe:
    """Six steps of four rows of 64, checkpoints every second."""
    own: dict[str, Any] = {
        "tokens": 6 * 4 * 64,
        "context_length": 64,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
        "checkpoint_every": 2,
        "log_every": 1,
        "precision": "fp32",
    }
    return replace(Recipe(), train=TrainConfig(**(own | settings)))


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


@pytest.fixture
def mixture(corpus: Text, tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> dict[str, float]:
    """A file and a folder of tokens."""
    documents = list(torch.randint(60, 99, (30, 90), dtype=torch.int32))
    write_token_folder(documents, tmp_path / "tokens", tiny_tokenizer(), source="x")
    return {corpus(): 3.0, str(tmp_path / "tokens"): 1.0}


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_stopped_run_with_repeats_ends_as_an_unstopped_one(
    tiny_mol: Make, mixture: dict[str, float], dense_parent: Parent, tmp_path: Path, stop: int
) -> None:
    checkpoint, settings = tiny_mol(), recipe()

    def interrupt(done: int, total: int | None, note: str = "") -> None:
        if note and done >= stop * 4 * 64:
            raise Stopped

    train(checkpoint, tmp_path / "whole", mixture, settings, dense_parent)
    out = tmp_path / "stopped"
    with pytest.raises(Stopped):
        train(checkpoint, out, mixture, settings, dense_parent, progress=interrupt)
    train(checkpoint, out, mixture, settings, dense_parent, resume=True)
    whole, resumed = weights(tmp_path / "whole"), weights(out)
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name])
    losses = [line["kl"] for line in log_of(tmp_path / "whole")]
    assert [line["kl"] for line in log_of(out)] == losses
    assert all("repeats" in line["passes"] for line in log_of(out))


def test_another_share_of_repeats_is_another_run(
    tiny_mol: Make, mixture: dict[str, float], dense_parent: Parent, tmp_path: Path
) -> None:
    checkpoint, out = tiny_mol(), tmp_path / "out"

    def interrupt(done: int, total: int | None, note: str = "") -> None:
        if note and done >= 3 * 4 * 64:
            raise Stopped

    with pytest.raises(Stopped):
        train(checkpoint, out, mixture, recipe(), dense_parent, progress=interrupt)
    with pytest.raises(MolError, match="the data was another one"):
        train(checkpoint, out, mixture, recipe(repeats=0.5), dense_parent, resume=True)
    train(checkpoint, out, mixture, recipe(repeats=0.25), dense_parent, resume=True)  # as null


def test_repeats_of_0_are_off_and_change_what_is_learned(
    tiny_mol: Make, corpus: Text, dense_parent: Parent, tmp_path: Path
) -> None:
    checkpoint, data = tiny_mol(), corpus()
    for name, share in (("default", None), ("quarter", 0.25), ("none", 0.0)):
        train(checkpoint, tmp_path / name, data, recipe(repeats=share), dense_parent)
    assert set(log_of(tmp_path / "none")[-1]["passes"]) == {data}
    assert set(log_of(tmp_path / "default")[-1]["passes"]) == {data, "repeats"}
    default, quarter, none = (weights(tmp_path / n) for n in ("default", "quarter", "none"))
    assert all(torch.equal(tensor, quarter[name]) for name, tensor in default.items())
    assert any(not torch.equal(tensor, none[name]) for name, tensor in default.items())


def test_repeats_are_for_stages_that_distil() -> None:
    kinds = ("align", "distill", "pretrain")
    stages = [StageConfig(kind) for kind in kinds]

    def shares(config: TrainConfig) -> list[float]:
        return [stage.repeats for stage in resolve(config, has_parent=True)]

    assert shares(TrainConfig(stages=stages)) == [0, 0.25, 0]
    assert shares(TrainConfig(stages=stages, repeats=0.5)) == [0.5, 0.5, 0.5]
    assert shares(TrainConfig(stages=stages, repeats=0.0)) == [0, 0, 0]
    own = [replace(stages[0], repeats=0.1), replace(stages[1], repeats=0.0), stages[2]]
    assert shares(TrainConfig(stages=own)) == [0.1, 0, 0]
    assert shares(TrainConfig(context_length=47)) == [0]
    assert shares(TrainConfig(context_length=48)) == [0.25]
    assert shares(TrainConfig(logits="cache", repeats=0.5)) == [0]
    (pretrain,) = resolve(TrainConfig(), has_parent=False)
    assert pretrain.repeats == 0


@pytest.mark.parametrize(
    "key", ["train.repeats", "train.stages.0.repeats", "calibrate.repeats", "sample.repeats"]
)
@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(key: str, value: float) -> None:
    stages = ("train.stages", [{"kind": "distill", "repeats": 0.1}])
    with pytest.raises(MolError) as refused:
        load_recipe(None, [stages, (key, value)])
    assert (key in refused.value.found and "0.25" in refused.value.hint) or value != value
    assert load_recipe(None, [stages, (key, 0.99)])


@pytest.mark.parametrize(
    "section, key",
    [("train", "context_length"), ("calibrate", "context_length"), ("sample", "length")],
)
def test_repeats_in_rows_without_room_are_refused(section: str, key: str) -> None:
    settings = [(f"{section}.repeats", 0.25), (f"{section}.{key}", 47)]
    with pytest.raises(MolError, match="48 tokens or more") as refused:
        load_recipe(None, settings)
    assert refused.value.hint == f"{section}.repeats=0"
    assert load_recipe(None, settings[1:])
    assert load_recipe(None, [settings[0], (f"{section}.{key}", 48)])


def test_cached_logits_hold_repeats(
    tiny_mol: Make, corpus: Text, dense_parent: Parent, tmp_path: Path
) -> None:
    """A training on the cache then learns the same share of them."""
    data, settings = corpus(documents=400), recipe(repeats=0.25).train
    tokens = cache_logits(dense_parent, data, settings, tmp_path / "cache", top_k=9)
    assert tokens == settings.tokens
    cache = open_logits(tmp_path / "cache", None, vocab_size=VOCAB, length=64).corpus()
    assert {name: len(rows) for name, rows in cache.sources.items()} == {"repeats": 6, data: 18}
    assert not cache.sources["repeats"].select(slice(None)).document_ids.any()
    plain = load_rows(data, None, vocab_size=VOCAB, length=64, limit=18 * 64, seed=settings.seed)
    found = cache.sources[data].select(slice(None))
    assert torch.equal(found.input_ids, plain.select(slice(None)).input_ids)
    drawn = cache.order(0).indices(0, 24)
    assert int((drawn < 6).sum()) == 6
    own = recipe(repeats=0.25, logits=str(tmp_path / "cache"))
    train(tiny_mol(), tmp_path / "out", None, own)
    assert log_of(tmp_path / "out")[-1]["passes"] == {"repeats": 1.0, data: 1.0}
    assert open_checkpoint(tmp_path / "out", torch.device("cpu"))
