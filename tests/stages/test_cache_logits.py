"""Caching a tiny parent's predictions, and training on them."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from molcli.config.sections import Recipe, StageConfig, TrainConfig
from molcli.data.logits import open_logits
from molcli.errors import MolError
from molcli.families.parent import Parent, open_parent
from molcli.stages.cache_logits import cache_logits
from molcli.stages.train import train

Make = Callable[..., Path]
Corpus = Callable[..., str]
VOCAB = 128
CONFIG = TrainConfig(
    tokens=512,
    context_length=32,
    batch_size=4,
    micro_batch_size=2,
    learning_rate=1e-2,
    new_learning_rate=1e-2,
    log_every=1,
    precision="fp32",
)
ROW_BYTES = 32 * (5 * 6 + 12)  # with k = 5


@pytest.fixture
def parent(tiny_parent: Make) -> Parent:
    return open_parent(
        tiny_parent("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    )


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def kl_of(out: Path) -> list[float]:
    return [json.loads(line)["kl"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("k", [5, VOCAB])
@torch.no_grad()
def test_cache_has_the_parents_predictions_for_each_document(
    parent: Parent, corpus: Corpus, tmp_path: Path, k: int
) -> None:
    tokens = cache_logits(parent, corpus(), CONFIG, tmp_path / "cache", top_k=k, shard_bytes=9_000)
    assert tokens == 512
    cache = open_logits(tmp_path / "cache", None, vocab_size=VOCAB, length=32)
    assert len(cache.shards) > 1
    rows, index = cache.corpus().select(torch.tensor([13, 0, 7])), torch.tensor([13, 0, 7])
    ids, log_probs, rest = cache.predictions(index)
    model = AutoModelForCausalLM.from_pretrained(parent.folder).eval()
    for row in range(3):
        for document in rows.document_ids[row].unique():
            own = rows.document_ids[row] == document
            truth = model(rows.input_ids[row, own][None].long()).logits[0].double().softmax(-1)
            kept, order = truth.topk(k)
            # fp16 keeps 11 bits of logarithms below 16 here.
            torch.testing.assert_close(
                log_probs[row, own].double(), kept.log(), rtol=0, atol=16 * 2**-11
            )
            assert (ids[row, own, 0] == order[:, 0]).all()
            left = rest[row, own].double().exp()
            torch.testing.assert_close(left, (1 - kept.sum(-1)).clamp(min=0), rtol=0, atol=1e-6)


def test_a_stopped_run_loses_one_shard_and_resumes_to_the_same_cache(
    parent: Parent, corpus: Corpus, tmp_path: Path
) -> None:
    data, how = corpus(), dict(top_k=5, shard_bytes=4 * ROW_BYTES)
    cache_logits(parent, data, CONFIG, tmp_path / "whole", **how)  # type: ignore[arg-type]
    done: list[int] = []

    def stop(tokens: int, total: int | None, note: str = "") -> None:
        if total == 512 and tokens == 10 * 32:
            raise KeyboardInterrupt  # in the third of four shards

    def count(tokens: int, total: int | None, note: str = "") -> None:
        if total == 512 and tokens % 64 == 0:
            done.append(tokens // 32)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        cache_logits(parent, data, CONFIG, out, progress=stop, **how)  # type: ignore[arg-type]
    assert set(shards(out)) == {"logits.json", *(f"logits-0000{i}.safetensors" for i in (0, 1))}
    with pytest.raises(MolError, match="lacks 2 of 4 shards"):
        open_logits(out, None, vocab_size=VOCAB, length=32)
    with pytest.raises(MolError, match="other top_k"):
        cache_logits(parent, data, CONFIG, out, top_k=6, resume=True, shard_bytes=4 * ROW_BYTES)
    other = replace(CONFIG, seed=1)
    with pytest.raises(MolError, match="other data"):
        cache_logits(parent, data, other, out, resume=True, **how)  # type: ignore[arg-type]
    (out / ".logits-00002.safetensors.partial").touch()  # of a kill while writing
    cache_logits(parent, data, CONFIG, out, resume=True, progress=count, **how)  # type: ignore[arg-type]
    assert done[-4:] == [10, 12, 14, 16] and 8 not in done[-4:]
    assert shards(out) == shards(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["bit", "length", "pipe"])
def test_a_resumed_run_checks_what_is_there(
    parent: Parent, corpus: Corpus, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "cache"

    def run(resume: bool) -> None:
        size = 3 * ROW_BYTES
        cache_logits(parent, corpus(), CONFIG, out, top_k=5, shard_bytes=size, resume=resume)

    run(resume=False)
    whole = shards(out)
    first, last = out / "logits-00000.safetensors", out / "logits-00005.safetensors"
    last.unlink()
    content = bytearray(whole[first.name])
    first.unlink()
    if damage == "pipe":
        os.mkfifo(first)
    else:
        content[-7] ^= 1
        first.write_bytes(content[:-8] if damage == "length" else content)

    said = r"logits-00000\.safetensors (is damaged|does not have)"
    with pytest.raises(MolError, match=said) as refused:
        run(resume=True)
    assert f"remove {first}" in str(refused.value) and not last.exists()
    first.unlink()
    run(resume=True)
    assert shards(out) == whole


@pytest.mark.parametrize("resume", [False, True])
def test_a_kill_while_the_first_file_was_written_is_no_dead_end(
    parent: Parent, corpus: Corpus, tmp_path: Path, resume: bool
) -> None:
    data, out = corpus(), tmp_path / "out"
    out.mkdir()
    (out / ".logits.json.partial").write_text('{"form')
    cache_logits(parent, data, CONFIG, out, top_k=5, resume=resume)
    cache_logits(parent, data, CONFIG, tmp_path / "whole", top_k=5)
    assert shards(out) == shards(tmp_path / "whole")


def test_the_same_call_on_an_unfinished_cache_is_told_to_resume(
    parent: Parent, corpus: Corpus, tmp_path: Path
) -> None:
    cache_logits(parent, corpus(), CONFIG, tmp_path / "out", top_k=5)
    (tmp_path / "out" / "logits-00000.safetensors").unlink()
    with pytest.raises(MolError, match="holds cached logits") as caught:
        cache_logits(parent, corpus(), CONFIG, tmp_path / "out", top_k=5)
    assert "--resume" in caught.value.hint


def test_two_runs_do_not_write_one_cache(parent: Parent, corpus: Corpus, tmp_path: Path) -> None:
    data, refused = corpus(), []

    def again(tokens: int, total: int | None, note: str = "") -> None:
        for resume in (False, True):
            with pytest.raises(MolError, match="another run is writing") as caught:
                cache_logits(parent, data, CONFIG, tmp_path / "out", top_k=5, resume=resume)
            refused.append(caught.value)

    cache_logits(parent, data, CONFIG, tmp_path / "out", top_k=5, progress=again)
    assert refused
    open_logits(tmp_path / "out", None, vocab_size=VOCAB, length=32)


def test_a_failed_start_leaves_no_folder_and_no_file_of_the_users_is_touched(
    parent: Parent, corpus: Corpus, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"input_ids": [3, 400]}\n')
    with pytest.raises(MolError, match=r"line 1: .* token id 400"):
        cache_logits(parent, str(bad), CONFIG, tmp_path / "out", top_k=5)
    assert not (tmp_path / "out").exists()
    theirs, out = tmp_path / "theirs", tmp_path / "held"
    theirs.write_text("precious")
    out.mkdir()
    (out / ".logits.json.partial").symlink_to(theirs)
    (out / ".logits-00000.safetensors.partial").symlink_to(theirs)
    cache_logits(parent, corpus(), CONFIG, out, top_k=5)
    assert theirs.read_text() == "precious"
    (tmp_path / "full").mkdir()
    for name in (".logits.json.partial", "notes.txt"):
        (tmp_path / "full" / name).write_text("theirs")
    for resume, found in ((False, "not empty"), (True, "no cache to resume")):
        with pytest.raises(MolError, match=found):
            cache_logits(parent, corpus(), CONFIG, tmp_path / "full", top_k=5, resume=resume)
    assert len(list((tmp_path / "full").iterdir())) == 2


def test_predictions_that_are_not_finite_are_refused(
    parent: Parent, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are finite can give logits that are not."""

    def huge(self: Parent, index: int) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(w, 1e30) for name, w in whole(self, index).items()}

    whole = Parent.dense_layer
    monkeypatch.setattr(Parent, "dense_layer", huge)
    with pytest.raises(MolError, match=r"the parent predicts .*nan for row 0"):
        cache_logits(parent, corpus(), CONFIG, tmp_path / "out", top_k=5)
    assert not (tmp_path / "out").exists()


def test_training_on_a_whole_vocabulary_cache_equals_training_on_the_parent(
    parent: Parent, tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    """The same rows in the same order, whole passes included; only fp16 stands between the two, and
    what it does to one step grows in the next. For k < V the KL is over fewer buckets: lower."""
    checkpoint, data = tiny_mol(), corpus()
    longer = replace(CONFIG, tokens=1024)
    train(checkpoint, tmp_path / "live", data, Recipe(train=longer), parent)
    for k in (VOCAB, 16):
        cache = tmp_path / f"cache{k}"
        cache_logits(parent, data, longer, cache, top_k=k)
        cached = Recipe(train=replace(longer, logits=str(cache)))
        train(checkpoint, tmp_path / f"out{k}", None, cached)
    live, whole, part = (kl_of(tmp_path / name) for name in ("live", f"out{VOCAB}", "out16"))
    assert len(live) == 8
    assert whole[0] == pytest.approx(live[0], rel=1e-3)
    assert whole == pytest.approx(live, rel=1e-2)
    assert part[0] < live[0]
    assert part[-1] < 0.9 * part[0]


def test_training_resumes_on_a_cache_that_was_moved(
    parent: Parent, tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    checkpoint, cache = tiny_mol(), tmp_path / "cache"
    cache_logits(parent, corpus(), CONFIG, cache, top_k=8)

    def recipe(folder: Path) -> Recipe:
        return Recipe(train=replace(CONFIG, logits=str(folder), checkpoint_every=1))

    def stop(done: int, total: int | None, note: str = "") -> None:
        if done == 3 * 4 * 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(checkpoint, tmp_path / "out", None, recipe(cache), progress=stop)
    moved = cache.rename(tmp_path / "moved")
    train(checkpoint, tmp_path / "out", None, recipe(moved), resume=True)
    train(checkpoint, tmp_path / "whole", None, recipe(moved))
    assert kl_of(tmp_path / "out") == kl_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "change, found",
    [
        (dict(length=16), "context_length of 32, but this run has one of 16"),
        (dict(vocab_size=129), "vocabulary of 128, but this run has one of 129"),
        (dict(tokenizer=60), "another tokenizer"),
    ],
)
def test_another_models_cache_is_refused(
    parent: Parent,
    corpus: Corpus,
    tmp_path: Path,
    tiny_tokenizer: Callable[..., Any],
    change: dict[str, int],
    found: str,
) -> None:
    cache_logits(parent, corpus(), CONFIG, tmp_path / "cache", top_k=5)
    given: dict[str, Any] = dict(tokenizer=120, vocab_size=VOCAB, length=32) | change
    given["tokenizer"] = tiny_tokenizer(given["tokenizer"])
    with pytest.raises(MolError, match=found):
        open_logits(tmp_path / "cache", **given)


def test_a_folder_without_a_cache_is_refused(
    parent: Parent, corpus: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(MolError, match="top-k is 129"):
        cache_logits(parent, corpus(), CONFIG, tmp_path / "out", top_k=129)
    with pytest.raises(MolError, match="no cache to resume"):
        cache_logits(parent, corpus(), CONFIG, tmp_path / "out", top_k=5, resume=True)
    with pytest.raises(MolError, match="not empty"):
        cache_logits(parent, corpus(), CONFIG, tmp_path, top_k=5)
    with pytest.raises(MolError, match="not a cache"):
        open_logits(tmp_path, None, vocab_size=VOCAB, length=32)
    cache_logits(parent, corpus(), CONFIG, tmp_path / "cut", top_k=5)
    shard = tmp_path / "cut" / "logits-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(MolError, match="damaged"):
        open_logits(tmp_path / "cut", None, vocab_size=VOCAB, length=32)


def test_a_stage_with_its_own_data_does_not_use_the_cache(
    parent: Parent, tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    cache_logits(parent, corpus(), CONFIG, tmp_path / "cache", top_k=5)
    stages = [
        StageConfig("distill", tokens=256),
        StageConfig("pretrain", tokens=256, data=corpus("own.jsonl", documents=39)),
        StageConfig("pretrain", tokens=256),
    ]
    cached = replace(CONFIG, logits=str(tmp_path / "cache"), stages=stages)
    train(tiny_mol(), tmp_path / "out", None, Recipe(train=cached))
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").open()]
    kinds = ["0 distill"] * 2 + ["1 pretrain"] * 2 + ["2 pretrain"] * 2
    assert [line["stage"] for line in lines] == kinds
    assert [line["kl"] is None for line in lines] == [False] * 2 + [True] * 4
    sources = [Path(*line["passes"]).name for line in lines]
    assert sources == ["corpus.jsonl"] * 2 + ["own.jsonl"] * 2 + ["corpus.jsonl"] * 2


@pytest.mark.parametrize(
    "change, found",
    [
        (dict(temperature=2.0), "`train.temperature` is 2.0"),
        (dict(stages="auto"), "would choose the context length"),
        (dict(stages=[StageConfig("align")]), "learns from the parent's layers"),
        (dict(stages=[StageConfig("distill", data="DATA")]), "and none is given"),
        (
            dict(stages=[StageConfig("distill"), StageConfig("pretrain", context_length=16)]),
            "context_length of 32, but this run has one of 16",
        ),
    ],
)
def test_stages_that_a_cache_does_not_support_are_refused_before_any_work(
    parent: Parent,
    tiny_mol: Make,
    corpus: Corpus,
    tmp_path: Path,
    change: dict[str, Any],
    found: str,
) -> None:
    cache_logits(parent, corpus(), CONFIG, tmp_path / "cache", top_k=5)
    cached = replace(CONFIG, logits=str(tmp_path / "cache"), **change)
    with pytest.raises(MolError, match=found):
        train(tiny_mol(), tmp_path / "out", None, Recipe(train=cached))
    assert not (tmp_path / "out").exists()
