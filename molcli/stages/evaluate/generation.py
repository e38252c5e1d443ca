"""Whether a model goes on as its parent does, when both read what they wrote themselves."""

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
    """Greedy continuations of model and parent, from the same prompts.

    prompts: how many, of prompt_length tokens. continuation_length: tokens of each continuation;
    one that ends early agrees, from there on, with one that ended too. matching_tokens: mean
    length of what the two have in common at the start. full_match: share of prompts on which they
    agree to the last token.
    """

    prompts: int
    prompt_length: int
    continuation_length: int
    matching_tokens: float
    full_match: float


def cut_prompts(documents: list[Tensor], count: int, length: int) -> Tensor:
    """At most `count` pieces that do not overlap, (n, length) int64: every document's opening,
    then every document's second piece, and so on. Equal lengths need no padding.

    documents: (tokens,) each.
    """
    pieces = list(islice(_pieces(documents, length), count))
    return torch.stack(pieces).long() if pieces else torch.empty(0, length, dtype=torch.int64)


def _pieces(documents: list[Tensor], length: int) -> Iterator[Tensor]:
    longest = max((len(document) for document in documents), default=0)
    for start in range(0, longest - length + 1, length):
        for document in documents:
            if len(document) >= start + length:
                yield document[start : start + length]


@torch.no_grad()
def compare(
    models: Models, prompts: Tensor, length: int, batch_size: int, progress: Progress
) -> Generation:
    """prompts: (n, tokens) int64, n > 0; length: tokens to generate. There must be a parent."""
    assert models.parent is not None
    ends = end_tokens(models.model)
    progress(0, len(prompts), "continuations")
    matching = []
    for batch in prompts.split(batch_size):
        ours, theirs = (
            _continuations(model, batch.to(models.device), length, ends)
            for model in (models.model, models.parent)
        )
        matching.append((ours == theirs).long().cumprod(dim=1).sum(dim=1).cpu())
        progress(sum(map(len, matching)), len(prompts), "continuations")
    tokens = torch.cat(matching).double()
    return Generation(
        prompts=len(prompts),
        prompt_length=prompts.shape[1],
        continuation_length=length,
        matching_tokens=tokens.mean().item(),
        full_match=(tokens == length).double().mean().item(),
    )


def _continuations(model: MoLForCausalLM, prompts: Tensor, length: int, ends: list[int]) -> Tensor:
    """(n, tokens) -> (n, length): after its end, a continuation is filled with one token."""
    ids = generate_greedily(model, prompts, length, ends)[:, prompts.shape[1] :]
    return F.pad(ids, (0, length - ids.shape[1]), value=ends[0] if ends else 0)
