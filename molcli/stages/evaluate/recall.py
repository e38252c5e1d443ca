"""Associative recall: predict a value from its key, many tokens after the pair was read.

A prompt is a list of "key: value" lines of single-token words, then filler words, then one of the
keys again. The task needs no data and no training: induction heads, or a recurrent state that
holds the pair, solve it.

Source: Zoology (arXiv 2312.04927), there with trained models and random token ids.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molcli.config.sections import EvaluateConfig
from molcli.maths.figures import check_activations
from molcli.model import MoLForCausalLM
from molcli.progress import Progress
from molcli.stages.evaluate.heldout import Models

# Byte-level and SentencePiece vocabularies mark the space in front of a word. Shorter tokens are
# mostly the beginnings of words, after which a model predicts the rest of the word.
_WORD = re.compile("[Ġ▁][a-z]{3,}")


@dataclass(frozen=True)
class RecallScore:
    """Accuracy of one model at one distance.

    Attributes:
        accuracy: share of prompts whose value has the highest logit of the whole vocabulary.
        accuracy_among_values: share of prompts whose value has the highest logit of all values in
            the prompt; chance is 1 / pairs.
        median_rank: median rank of the value in the vocabulary; 1 is the highest logit.
    """

    accuracy: float
    accuracy_among_values: float
    median_rank: int


@dataclass(frozen=True)
class Recall:
    """Scores at one distance.

    Attributes:
        distance: filler tokens between the list and the queried key.
        model: score of the model.
        parent: score of the parent, if there is one.
    """

    distance: int
    model: RecallScore
    parent: RecallScore | None


@dataclass(frozen=True)
class RecallPrompts:
    """Prompts of one length. The next token of prompt i should be values[i, query[i]].

    Attributes:
        ids: (n, T) int64 tokens.
        values: (n, pairs) int64, values in the order of the list.
        query: (n,) int64, index of the queried pair.
    """

    ids: Tensor
    values: Tensor
    query: Tensor


@torch.no_grad()
def measure_recall(models: Models, config: EvaluateConfig, progress: Progress) -> list[Recall]:
    """Measure recall of model and parent at each distance that fits the model's positions.

    Args:
        models: both models, with a tokenizer for which `recall_obstacle` returns "".
        config: number of prompts and pairs, distances, batch size and seed.
        progress: called with finished and total prompts.

    Returns:
        One entry per distance, in the order of the configuration.
    """
    assert models.tokenizer is not None
    count, results = config.recall_sequences, []
    total = count * len(config.recall_distances)
    for i, distance in enumerate(config.recall_distances):
        progress(i * count, total, f"{distance} tokens of filler")
        if distance >= models.positions:  # drawing its prompts could take more memory than there is
            continue
        prompts = draw_prompts(models.tokenizer, count, config.recall_pairs, distance, config.seed)
        if prompts.ids.shape[1] > models.positions:
            continue
        scores = {
            name: _score(name, model, prompts, config.batch_size)
            for name, model in models.named().items()
        }
        results.append(Recall(distance, scores["model"], scores.get("parent")))
    progress(total, total)
    return results


def recall_obstacle(tokenizer: PreTrainedTokenizerBase | None, pairs: int) -> str:
    """Return why recall cannot be measured with this tokenizer, or "" if it can."""
    if tokenizer is None:
        return "the model has no tokenizer, hence no words"
    found, needed = len(word_tokens(tokenizer)), 2 * pairs + 1
    if found < needed:
        return (
            f"{pairs} pairs and filler need {needed} words of one token, the tokenizer has {found}"
        )
    return ""


def word_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the tokens that are a lower-case word with its space, (words,) int64, ascending."""
    special = set(tokenizer.all_special_tokens)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    ids = [i for token, i in vocabulary.items() if _WORD.fullmatch(token) and token not in special]
    return torch.tensor(sorted(ids), dtype=torch.int64)


def draw_prompts(
    tokenizer: PreTrainedTokenizerBase, count: int, pairs: int, distance: int, seed: int
) -> RecallPrompts:
    """Draw prompts from the tokenizer's words.

    Each prompt has its own words. Keys and values are distinct, and filler words are neither; a
    filler word may occur several times. The same seed draws the same pairs and queries for every
    distance.

    Args:
        tokenizer: has more than 2 * pairs words.
        count: number of prompts.
        pairs: keys with values in a prompt.
        distance: filler tokens between the list and the queried key.
        seed: of the random numbers.
    """
    words = word_tokens(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    drawn = words[torch.rand(count, len(words), generator=generator).argsort(dim=1)]
    keys, values, rest = drawn.split([pairs, pairs, len(words) - 2 * pairs], dim=1)
    query = torch.randint(pairs, (count,), generator=generator)
    filler = rest.gather(1, torch.randint(rest.shape[1], (count, distance), generator=generator))

    def repeated(text: str) -> Tensor:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64).expand(count, -1)

    colon, newline = repeated(":"), repeated("\n")
    adds_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    pieces = [torch.full((count, 1), tokenizer.bos_token_id)] if adds_bos else []
    for key, value in zip(keys.split(1, dim=1), values.split(1, dim=1), strict=True):
        pieces += [key, colon, value, newline]
    pieces += [filler, newline, keys.gather(1, query[:, None]), colon]
    return RecallPrompts(torch.cat(pieces, dim=1), values, query)


def _score(
    name: str, model: MoLForCausalLM, prompts: RecallPrompts, batch_size: int
) -> RecallScore:
    logits = torch.cat(
        [
            model(ids.to(model.device), use_cache=False, logits_to_keep=1)
            .logits[:, -1]
            .float()
            .cpu()
            for ids in prompts.ids.split(batch_size)
        ]
    )
    check_activations(f"the {name}'s logits", logits)
    value_logits = logits.gather(1, prompts.values)
    correct = value_logits.gather(1, prompts.query[:, None])
    ranks = 1 + (logits > correct).sum(dim=1)
    return RecallScore(
        accuracy=(ranks == 1).double().mean().item(),
        accuracy_among_values=(value_logits.argmax(1) == prompts.query).double().mean().item(),
        median_rank=int(ranks.median()),
    )
