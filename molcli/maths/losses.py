"""Language-model losses from hidden states, without the logits of a whole batch.

Logits are computed for a few tokens at a time, from hidden states and the weight of the LM head,
and so is their gradient, at once: the memory for them is bounded at any batch size, and no softmax
is taken twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molcli.maths.top_k import TopK, keep_top_k, top_k_kl

IGNORED = -100  # the label that is left out of every sum
# tokens x vocabulary of one chunk: 256 MiB in fp32 on a GPU, which wants few launches; on a CPU
# what its cache holds.
LOGITS_AT_ONCE = {"cuda": 2**26, "cpu": 2**24}


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


@dataclass(frozen=True)
class TrainingLoss:
    """Sums over the predicted tokens; scalars, fp32 (float64 for float64 inputs).

    loss: ce_weight * cross_entropy + kl_weight * kl, the only one with a gradient.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor


@torch.no_grad()
def token_losses(model: Head, labels: Tensor, parent: Head | None = None) -> TokenLosses:
    """Next-token cross-entropy, and forward KL to the parent's distribution, summed over tokens.

    labels: (B, T), aligned with the inputs as in Hugging Face models: the state at t predicts the
    label at t + 1; IGNORED ones count nowhere. The parent's width may differ, its vocabulary not.
    Logits are multiplied in the dtype of their inputs (or autocast's) and reduced in fp32.
    """
    sums = model.hidden.new_zeros(4, dtype=_at_least_fp32(model.hidden.dtype))
    for log_q, log_p, targets, known in _chunks(model, labels, parent):
        columns = torch.zeros(4, len(targets), dtype=sums.dtype, device=sums.device)
        columns[0] = -log_q.gather(1, targets)[:, 0]
        if log_p is not None:
            columns[1] = (log_p.exp() * (log_p - log_q)).sum(1)
            columns[2] = -log_p.gather(1, targets)[:, 0]
            columns[3] = log_p.argmax(1) == log_q.argmax(1)
        sums += torch.where(known, columns, 0).sum(1)
    count = (labels[:, 1:] != IGNORED).sum()
    return TokenLosses(sums[0], sums[1], sums[2], sums[3], count)


@torch.no_grad()
def top_k_predictions(model: Head, k: int) -> TopK:
    """The k most likely next tokens of every position, (B, T, k); fp32 (float64 for float64)."""
    weight = model.weight.to(_product_dtype(model.hidden))
    at_once = LOGITS_AT_ONCE.get(weight.device.type, LOGITS_AT_ONCE["cuda"])
    states = model.hidden.flatten(0, 1).split(max(1, at_once // len(weight)))
    kept = [keep_top_k(_log_softmax(x, weight), k) for x in states]
    shape = model.hidden.shape[:2]
    fields = zip(*((part.ids, part.log_probs, part.rest) for part in kept), strict=True)
    return TopK(*(torch.cat(field).unflatten(0, shape) for field in fields))


def training_loss(
    model: Head,
    labels: Tensor,
    parent: Head | TopK | None,
    *,
    ce_weight: float,
    kl_weight: float,
) -> TrainingLoss:
    """The weighted sum of both losses; arguments as for `token_losses`.

    A parent's TopK, (B, T, k), gives the KL of `top_k_kl`.
    Gradients flow to model.hidden and model.weight only, and are multiplied in the same dtype as
    the logits; that of the weight is summed over chunks in fp32.
    """
    return TrainingLoss(
        *_LossAndGradient.apply(  # type: ignore[no-untyped-call]
            model.hidden, model.weight, labels, parent, ce_weight, kl_weight
        )
    )


class _LossAndGradient(torch.autograd.Function):
    """The backward pass of a loss that is one scalar is known, but for a factor, in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        parent: Head | TopK | None,
        ce_weight: float,
        kl_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        high = _at_least_fp32(hidden.dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        states, matrix = hidden[:, :-1].flatten(0, 1), weight.to(_product_dtype(hidden))
        for_hidden = torch.zeros_like(states) if wants_hidden else None
        for_weight = torch.zeros_like(weight, dtype=high) if wants_weight else None
        sums = hidden.new_zeros(2, dtype=high)
        first = 0
        head, kept = (None, parent) if isinstance(parent, TopK) else (parent, None)
        for log_q, log_p, targets, known in _chunks(Head(hidden, matrix), labels, head):
            part = slice(first, first := first + len(targets))
            gradient = log_q.exp().mul_(ce_weight + (0 if log_p is None else kl_weight))
            if kept is not None:
                kl, by_logits = top_k_kl(log_q, _rows_of(kept, part).exact(high))
                gradient.add_(by_logits, alpha=kl_weight)
                sums[1] += torch.where(known, kl, 0).sum()
            sums[0] -= torch.where(known, log_q.gather(1, targets)[:, 0], 0).sum()
            if log_p is not None:
                p = log_p.exp()
                gradient.sub_(p, alpha=kl_weight)
                sums[1] += torch.where(known, p.mul_(log_p.sub_(log_q)).sum(1), 0).sum()
            gradient.scatter_add_(1, targets, torch.full_like(targets, -ce_weight, dtype=high))
            gradient = gradient.mul_(known[:, None]).to(matrix.dtype)
            if for_hidden is not None:
                for_hidden[part] = gradient @ matrix
            if for_weight is not None:
                for_weight += gradient.mT @ states[part].to(matrix.dtype)
        if for_hidden is not None:  # the last position of every row predicts nothing
            for_hidden = torch.nn.functional.pad(
                for_hidden.unflatten(0, (hidden.shape[0], -1)), (0, 0, 0, 1)
            )
        ctx.save_for_backward(for_hidden, None if for_weight is None else for_weight.to(weight))
        cross_entropy, kl = sums.unbind()
        loss = ce_weight * cross_entropy + kl_weight * kl
        ctx.mark_non_differentiable(cross_entropy, kl)
        return loss, cross_entropy, kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        for_hidden, for_weight = ctx.saved_tensors
        return (
            None if for_hidden is None else for_hidden * upstream[0],
            None if for_weight is None else for_weight * upstream[0],
            *(None, None, None, None),
        )


def _chunks(
    model: Head, labels: Tensor, parent: Head | None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
    """(n, V) log-probabilities of model and parent, (n, 1) targets, (n,) whether they count."""
    with torch.no_grad():
        targets = labels[:, 1:].flatten()
        known = targets != IGNORED
        targets = torch.where(known, targets, 0)[:, None]
        heads = [head for head in (model, parent) if head is not None]
        states = [head.hidden[:, :-1].flatten(0, 1) for head in heads]
        matrices = [head.weight.to(_product_dtype(head.hidden)) for head in heads]
        at_once = LOGITS_AT_ONCE.get(labels.device.type, LOGITS_AT_ONCE["cuda"])
        chunk = max(1, at_once // len(model.weight))
        for first in range(0, len(targets), chunk):
            part = slice(first, first + chunk)
            logs = [_log_softmax(x[part], w) for x, w in zip(states, matrices, strict=True)]
            yield logs[0], None if parent is None else logs[1], targets[part], known[part]


def _rows_of(kept: TopK, part: slice) -> TopK:
    """(n, k) of the predicted positions, counted as `_chunks` does: without the last of a row."""
    fields = (x[:, :-1].flatten(0, 1)[part] for x in (kept.ids, kept.log_probs, kept.rest))
    return TopK(*fields)


def _log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
    """(n, V) log-probabilities, at least fp32."""
    logits = hidden.to(weight.dtype) @ weight.mT
    return logits.to(_at_least_fp32(logits.dtype)).log_softmax(1)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What autocast would multiply x in."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
