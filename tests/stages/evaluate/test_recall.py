"""Recall prompts are as described, and scores are those of the model's logits."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from molcli.config.sections import EvaluateConfig
from molcli.progress import silent
from molcli.stages.evaluate.heldout import Models, open_models
from molcli.stages.evaluate.recall import (
    draw_prompts,
    measure_recall,
    recall_obstacle,
    word_tokens,
)

WORDS = ["apple", "river", "stone", "cloud", "tiger", "green", "seven", "house", "night"]


def tokenizer_of(words: list[str], bos: str | None = None) -> PreTrainedTokenizerFast:
    """Whole words with the space in front of them, and the bytes of all else."""
    marked = [f"Ġ{word}" for word in words]
    others = ["<s>", ":", "Ċ", "Ġ", "Ġ2nd", "inside", "Ġin", "ĠUpper"]
    vocabulary = {token: i for i, token in enumerate(others + marked)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="Ġ"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos)


def test_word_tokens_are_whole_words() -> None:
    tokenizer = tokenizer_of(WORDS)
    assert tokenizer.convert_ids_to_tokens(word_tokens(tokenizer)) == [f"Ġ{word}" for word in WORDS]


def test_a_prompt_lists_pairs_then_filler_then_one_of_the_keys() -> None:
    tokenizer = tokenizer_of(WORDS)
    prompts = draw_prompts(tokenizer, count=20, pairs=3, distance=4, seed=0)
    for ids, values, answer in zip(
        prompts.ids, prompts.values, prompts.query.tolist(), strict=True
    ):
        *pairs, filler, question = tokenizer.decode(ids).split("\n")
        listed = dict(pair.split(":") for pair in pairs)
        assert len(listed) == len(set(listed.values())) == 3
        assert len(filler.split()) == 4
        assert not set(filler.split(" ")[1:]) & {w.strip() for p in listed.items() for w in p}
        assert question[-1] == ":"
        assert listed[question[:-1]] == tokenizer.decode(values[answer])
        assert [tokenizer.decode(value) for value in values] == list(listed.values())
    assert set(prompts.query.tolist()) == {0, 1, 2}


def test_the_seed_draws_the_pairs_whatever_the_distance() -> None:
    near, far, other = (
        draw_prompts(tokenizer_of(WORDS), 5, 3, distance, seed)
        for distance, seed in ((0, 0), (9, 0), (0, 1))
    )
    listed = 3 * 4
    assert torch.equal(near.ids[:, :listed], far.ids[:, :listed])
    assert torch.equal(near.query, far.query)
    assert not torch.equal(near.ids, other.ids)
    assert far.ids.shape[1] == near.ids.shape[1] + 9


class Reader(torch.nn.Module):
    """Finds the last key among the earlier tokens and answers with what stands `after` later."""

    device = torch.device("cpu")
    config = SimpleNamespace(max_position_embeddings=40)

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def forward(self, ids: Tensor, **_: Any) -> SimpleNamespace:
        logits = torch.zeros(len(ids), 1, 64)
        for row, out in zip(ids.tolist(), logits, strict=True):
            out[0, row[row.index(row[-2]) + self.after]] = 1.0
        return SimpleNamespace(logits=logits)


def test_scores_of_a_model_that_recalls_and_one_that_predicts_the_colon() -> None:
    config = EvaluateConfig(
        batch_size=4, recall_sequences=10, recall_pairs=2, recall_distances=[0, 16, 500]
    )
    tokenizer = tokenizer_of(WORDS, bos="<s>")
    both: Any = Models(Reader(2), Reader(1), tokenizer)  # type: ignore[arg-type]
    found = measure_recall(both, config, silent)
    assert [row.distance for row in found] == [0, 16]  # 500 is beyond the positions
    for row in found:
        assert row.parent is not None
        assert (row.model.accuracy, row.model.median_rank) == (1, 1)
        assert row.model.accuracy_among_values == 1
        assert (row.parent.accuracy, row.parent.median_rank) == (0, 2)


def test_scores_use_the_logits_after_the_query(tiny_mol: Callable[..., Path]) -> None:
    model = open_models(tiny_mol(), None).model
    tokenizer = tokenizer_of(WORDS)
    config = EvaluateConfig(
        batch_size=3, recall_sequences=8, recall_pairs=2, recall_distances=[5], seed=3
    )
    (found,) = measure_recall(Models(model, None, tokenizer), config, silent)
    prompts = draw_prompts(tokenizer, 8, 2, 5, seed=3)
    right, ranks = 0, []
    for ids, values, answer in zip(
        prompts.ids, prompts.values, prompts.query.tolist(), strict=True
    ):
        with torch.no_grad():
            logits = model(ids[None]).logits[0, -1]
        right += int(logits[values].argmax()) == answer
        order = logits.argsort(descending=True).tolist()
        ranks.append(order.index(int(values[answer])) + 1)
    assert found.parent is None
    assert found.model.accuracy == pytest.approx(ranks.count(1) / 8)
    assert found.model.accuracy_among_values == pytest.approx(right / 8)
    assert found.model.median_rank == sorted(ranks)[3]


def test_an_obstacle_is_named() -> None:
    assert "no tokenizer" in recall_obstacle(None, 1)
    assert "need 11 words of one token, the tokenizer has 9" in recall_obstacle(
        tokenizer_of(WORDS), 5
    )
    assert recall_obstacle(tokenizer_of(WORDS), 4) == ""
