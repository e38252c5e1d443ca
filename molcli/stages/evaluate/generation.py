"""Compare greedy continuations of a model and its parent."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.model import MoLForCausalLM
from molcli.model.parent import end_tokens, generate_greedily
from molcli.progress import Progress
from molcli.stages.evaluate.heldout import Models


@dataclass(frozen=True)
class Generation:
    """Agreement of greedy continuations of model and parent, from the same prompts.

    A continuation that has ended agrees from there on with one that has ended, too.

    Attributes:
        prompts: number of prompts.
        prompt_length: tokens of a prompt.
        continuation_length: tokens of a continuation.
        matching_tokens: mean number of tokens before the first difference.
        full_match: share of prompts whose continuations are equal.
    """

    prompts: int
    prompt_length: int
    continuation_length: int
    matching_tokens: float
    full_match: float


def split_into_prompts(documents: list[Tensor], count: int, length: int) -> Tensor:
    """Cut documents into prompts of equal length, which need no padding.

    The first pieces of all documents come first, then their second pieces, and so on.

    Args:
        documents: (tokens,) each.
        count: largest number of prompts.
        length: tokens of a prompt.

    Returns:
        (n, length) int64, n <= count, pieces that do not overlap.
    """
    pieces = list(islice(_pieces(documents, length), count))
    return torch.stack(pieces).long() if pieces else torch.empty(0, length, dtype=torch.int64)


@torch.no_grad()
def compare_generation(
    models: Models, prompts: Tensor, length: int, batch_size: int, progress: Progress
) -> Generation:
    """Continue prompts greedily with model and parent, and measure where they differ first.

    Args:
        models: both models; there must be a parent.
        prompts: (n, tokens) int64, n > 0.
        length: tokens to generate.
        batch_size: prompts at a time.
        progress: called with finished and total prompts.
    """
    assert models.parent is not None
    ends = end_tokens(models.model)
    progress(0, len(prompts))
    matching = []
    for batch in prompts.split(batch_size):
        of_model, of_parent = (
            _continuations(model, batch.to(models.device), length, ends)
            for model in (models.model, models.parent)
        )
        matching.append((of_model == of_parent).long().cumprod(dim=1).sum(dim=1).cpu())
        progress(sum(map(len, matching)), len(prompts))
    tokens = torch.cat(matching).double()
    return Generation(
        prompts=len(prompts),
        prompt_length=prompts.shape[1],
        continuation_length=length,
        matching_tokens=tokens.mean().item(),
        full_match=(tokens == length).double().mean().item(),
    )


def _pieces(documents: list[Tensor], length: int) -> Iterator[Tensor]:
    longest = max((len(document) for document in documents), default=0)
    for start in range(0, longest - length + 1, length):
        for document in documents:
            if len(document) >= start + length:
                yield document[start : start + length]


def _continuations(model: MoLForCausalLM, prompts: Tensor, length: int, ends: list[int]) -> Tensor:
    """Continue (n, tokens) greedily to (n, length) new ones; past its end a row repeats a token."""
    ids = generate_greedily(model, prompts, length, ends)[:, prompts.shape[1] :]
    return F.pad(ids, (0, length - ids.shape[1]), value=ends[0] if ends else 0)
