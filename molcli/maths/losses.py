"""Language-model losses from hidden states, without the logits of a whole batch.

Logits are computed for a few tokens at a time, from hidden states and the weight of the LM head,
and again in the backward pass: the memory for them is bounded by LOGITS_AT_ONCE at any batch size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # the label that is left out of every sum
LOGITS_AT_ONCE = 2**26  # tokens x vocabulary of one chunk: 256 MiB in fp32


@dataclass(frozen=True)
class TokenLosses:
    """Sums over the predicted tokens; scalars, fp32 (float64 for float64 inputs).

    cross_entropy: of the labels, nats. kl: KL(parent || model), nats; 0 without a parent.
    parent_cross_entropy: the parent's, no gradient; 0 without a parent.
    agreement: tokens where model and parent rank the same token first; 0 without a parent.
    count: predicted tokens.
    """

    cross_entropy: Tensor
    kl: Tensor
    parent_cross_entropy: Tensor
    agreement: Tensor
    count: Tensor


@dataclass(frozen=True)
class Head:
    """What gives logits: hidden (B, T, D) times weight (V, D) transposed."""

    hidden: Tensor
    weight: Tensor


def token_losses(model: Head, labels: Tensor, parent: Head | None = None) -> TokenLosses:
    """Next-token cross-entropy, and forward KL to the parent's distribution, summed over tokens.

    labels: (B, T), aligned with the inputs as in Hugging Face models: the state at t predicts the
    label at t + 1; IGNORED ones count nowhere. The parent's width may differ, its vocabulary not.
    Gradients flow to model.hidden and model.weight only. Logits are multiplied in the dtype of
    their inputs (or autocast's) and reduced in fp32.
    """
    targets = labels[:, 1:].flatten()
    hidden = model.hidden[:, :-1].flatten(0, 1)
    parent_hidden = None if parent is None else parent.hidden[:, :-1].flatten(0, 1).detach()
    parent_weight = None if parent is None else parent.weight.detach()
    chunk = max(1, LOGITS_AT_ONCE // len(model.weight))
    sums = hidden.new_zeros(4, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for first in range(0, len(targets), chunk):
        part = slice(first, first + chunk)
        sums = sums + checkpoint(
            _chunk_sums,
            hidden[part],
            model.weight,
            targets[part],
            None if parent_hidden is None else parent_hidden[part],
            parent_weight,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return TokenLosses(sums[0], sums[1], sums[2], sums[3], (targets != IGNORED).sum())


def _chunk_sums(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    parent_hidden: Tensor | None,
    parent_weight: Tensor | None,
) -> Tensor:
    """(4,) sums in the order of TokenLosses, over one chunk of tokens: (n, D), (V, D), (n,)."""
    known = targets != IGNORED
    index = torch.where(known, targets, 0)[:, None]
    log_q = _log_softmax(hidden, weight)
    cross_entropy = -log_q.gather(1, index)[:, 0]
    if parent_hidden is None or parent_weight is None:
        zero = torch.zeros_like(cross_entropy)
        columns = [cross_entropy, zero, zero, zero]
    else:
        with torch.no_grad():
            log_p = _log_softmax(parent_hidden, parent_weight)
            agreement = (log_p.argmax(1) == log_q.argmax(1)).to(log_q.dtype)
            parent_cross_entropy = -log_p.gather(1, index)[:, 0]
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
        columns = [cross_entropy, kl, parent_cross_entropy, agreement]
    return torch.stack([torch.where(known, column, 0).sum() for column in columns])


def _log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
    """(n, V) log-probabilities, at least fp32."""
    logits = hidden @ weight.to(hidden.dtype).T
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
