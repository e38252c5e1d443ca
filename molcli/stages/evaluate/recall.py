"""Associative recall: a value read once, asked for by its key many tokens later.

A list of "key: value" lines of single-token words, then filler words, then one of the keys again.
The task needs no data and no training: induction heads, or a recurrent state that holds the pair,
solve it. Source of the idea: Zoology (arXiv 2312.04927), there with trained models and random ids.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molcli.config.sections import EvaluateConfig
from molcli.model import MoLForCausalLM
from molcli.progress import Progress
from molcli.stages.evaluate.heldout import Models

# Byte-level and SentencePiece vocabularies mark the space in front of a word. Shorter tokens are
# mostly the beginnings of words, which ask for the rest of them.
_WORD = re.compile("[Ġ▁][a-z]{3,}")


@dataclass(frozen=True)
class RecallScore:
    """accuracy: share of queries whose value has the highest logit of the whole vocabulary.
    accuracy_among_values: of the values in the sequence alone; chance is 1 / pairs. median_rank:
    of the value in the vocabulary, 1 is the highest.
    """

    accuracy: float
    accuracy_among_values: float
    median_rank: int


@dataclass(frozen=True)
class Recall:
    """distance: filler tokens between the list and the query. parent: None without one."""

    distance: int
    model: RecallScore
    parent: RecallScore | None


@dataclass(frozen=True)
class Puzzles:
    """ids: (n, T) int64, whose next token should be values[i, asked[i]]. values: (n, pairs) int64.
    asked: (n,) int64.
    """

    ids: Tensor
    values: Tensor
    asked: Tensor


def words_of(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(words,) int64: the tokens that look like a lower-case word with its space, ascending."""
    special = set(tokenizer.all_special_tokens)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    found = [
        i for token, i in vocabulary.items() if _WORD.fullmatch(token) and token not in special
    ]
    return torch.tensor(sorted(found), dtype=torch.int64)


def puzzles(
    tokenizer: PreTrainedTokenizerBase, count: int, pairs: int, distance: int, seed: int
) -> Puzzles:
    """Words are drawn anew for every sequence; a word stands in one place only, but for filler
    among itself. The same seed draws the same pairs and questions for every distance.
    The tokenizer must have more than 2 * pairs words.
    """
    words = words_of(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    drawn = words[torch.rand(count, len(words), generator=generator).argsort(dim=1)]
    keys, values, rest = drawn.split([pairs, pairs, len(words) - 2 * pairs], dim=1)
    asked = torch.randint(pairs, (count,), generator=generator)
    filler = rest.gather(1, torch.randint(rest.shape[1], (count, distance), generator=generator))

    def mark(text: str) -> Tensor:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64).expand(count, -1)

    colon, newline = mark(":"), mark("\n")
    starts = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    pieces = [torch.full((count, 1), tokenizer.bos_token_id)] if starts else []
    for key, value in zip(keys.split(1, dim=1), values.split(1, dim=1), strict=True):
        pieces += [key, colon, value, newline]
    pieces += [filler, newline, keys.gather(1, asked[:, None]), colon]
    return Puzzles(torch.cat(pieces, dim=1), values, asked)


def missing_for_recall(tokenizer: PreTrainedTokenizerBase | None, pairs: int) -> str:
    """Why a model cannot be tested, or ""."""
    if tokenizer is None:
        return "the model has no tokenizer, hence no words"
    found, needed = len(words_of(tokenizer)), 2 * pairs + 1
    if found < needed:
        return (
            f"{pairs} pairs and filler need {needed} words of one token, the tokenizer has {found}"
        )
    return ""


@torch.no_grad()
def recall(models: Models, config: EvaluateConfig, progress: Progress) -> list[Recall]:
    """One entry per distance that fits the model's positions, in the order of the config.

    `missing_for_recall` must have found nothing.
    """
    assert models.tokenizer is not None
    rows, found = config.recall_sequences, []
    total = rows * len(config.recall_distances)
    for i, distance in enumerate(config.recall_distances):
        progress(i * rows, total, f"recall at {distance}")
        asked = puzzles(models.tokenizer, rows, config.recall_pairs, distance, config.seed)
        if asked.ids.shape[1] > models.model.config.max_position_embeddings:
            continue
        scores = {
            name: _score(model, asked, config.batch_size) for name, model in models.named().items()
        }
        found.append(Recall(distance, scores["model"], scores.get("parent")))
    progress(total, total)
    return found


def _score(model: MoLForCausalLM, asked: Puzzles, batch_size: int) -> RecallScore:
    logits = torch.cat(
        [
            model(ids.to(model.device), use_cache=False, logits_to_keep=1)
            .logits[:, -1]
            .float()
            .cpu()
            for ids in asked.ids.split(batch_size)
        ]
    )
    of_values = logits.gather(1, asked.values)
    right = of_values.gather(1, asked.asked[:, None])
    ranks = 1 + (logits > right).sum(dim=1)
    return RecallScore(
        accuracy=(ranks == 1).double().mean().item(),
        accuracy_among_values=(of_values.argmax(1) == asked.asked).double().mean().item(),
        median_rank=int(ranks.median()),
    )
