"""Language-model losses from hidden states, without the logits of a whole batch.

Logits are computed for a few tokens at a time, from hidden states and the weight of the LM head,
and so is their gradient, at once: the memory for them is bounded at any batch size, and no softmax
is taken twice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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


class TrainingLoss(NamedTuple):
    """Sums over the predicted tokens; scalars, fp32 (float64 for float64 inputs).

    loss: ce_weight * cross_entropy + kl_weight * T^2 KL_T, the only one with a gradient; KL_T is
    the KL between both distributions at temperature T. kl: at temperature 1, whatever T is.
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
    for _, q, p, targets, known in _chunks(model, labels, parent):
        log_q, log_p = _log_softmax(q), None if p is None else _log_softmax(p)
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
    kept = [keep_top_k(_log_softmax(x.to(weight.dtype) @ weight.mT), k) for x in states]
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
    temperature: float = 1.0,
    compiled: bool = False,
) -> TrainingLoss:
    """The weighted sum of both losses; arguments as for `token_losses`.

    parent: a TopK, (B, T, k), gives the KL of `top_k_kl`. temperature: of the KL; its square keeps
    the gradient's size (arXiv 1503.02531). With a TopK it is 1: of the other tokens' probabilities
    only the sum is known.

    Gradients flow to model.hidden and model.weight only, and are multiplied in the same dtype as
    the logits; that of the weight is summed over chunks in fp32. compiled: fuses what is done to
    a chunk's logits (torch.compile); for long runs on a GPU.
    """
    assert temperature == 1 or not isinstance(parent, TopK)
    return TrainingLoss(
        *_LossAndGradient.apply(  # type: ignore[no-untyped-call]
            model.hidden, model.weight, labels, parent, ce_weight, kl_weight, temperature, compiled
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
        temperature: float,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        high = _at_least_fp32(hidden.dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(_product_dtype(hidden))
        states = hidden[:, :-1].flatten(0, 1).to(matrix.dtype)
        for_hidden = torch.zeros_like(states, dtype=hidden.dtype) if wants_hidden else None
        for_weight = torch.zeros_like(weight, dtype=high) if wants_weight else None
        chunk_loss = _compiled_chunk_loss() if compiled else _chunk_loss
        head, kept = (None, parent) if isinstance(parent, TopK) else (parent, None)
        if kept is not None:  # as the states: without the last position of every row
            fields = (kept.ids, kept.log_probs, kept.rest)
            kept = TopK(*(field[:, :-1].flatten(0, 1) for field in fields))
        soft = head is not None and temperature != 1
        softened = _compiled_softened_kl() if compiled else _softened_kl
        sums = hidden.new_zeros(3, dtype=high)  # cross-entropy, KL, T^2 KL_T
        for part, q, p, targets, known in _chunks(Head(hidden, matrix), labels, head):
            taught = p if kept is None else kept.rows(part).exact(high)
            at_one = 0.0 if soft else kl_weight
            gradient, cross_entropy, kl = chunk_loss(q, taught, targets, known, ce_weight, at_one)
            divergence = kl
            if soft:
                assert p is not None
                towards_p, divergence = softened(q, p, known, kl_weight, temperature)
                gradient = gradient + towards_p
            sums += torch.stack([cross_entropy, kl, divergence])
            if for_hidden is not None:
                for_hidden[part] = gradient @ matrix
            if for_weight is not None:
                for_weight += gradient.mT @ states[part]
        if for_hidden is not None:  # the last position of every row predicts nothing
            for_hidden = F.pad(for_hidden.unflatten(0, (hidden.shape[0], -1)), (0, 0, 0, 1))
        ctx.save_for_backward(for_hidden, None if for_weight is None else for_weight.to(weight))
        cross_entropy, kl, divergence = sums.unbind()
        loss = ce_weight * cross_entropy + kl_weight * divergence
        ctx.mark_non_differentiable(cross_entropy, kl)
        return loss, cross_entropy, kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        for_hidden, for_weight = ctx.saved_tensors
        return (
            None if for_hidden is None else for_hidden * upstream[0],
            None if for_weight is None else for_weight * upstream[0],
            *(None, None, None, None, None, None),
        )


def _chunk_loss(
    q: Tensor,
    p: Tensor | TopK | None,
    targets: Tensor,
    known: Tensor,
    ce_weight: float,
    kl_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, p: (n, V) logits of model and parent, or (n, k) of what was kept of the parent's
    distribution, at least fp32; targets: (n, 1); known: (n,).

    Returns the gradient of the weighted sum towards q, (n, V) in q's dtype, and both sums.
    """
    log_q = _log_softmax(q)
    cross_entropy = -torch.where(known, log_q.gather(1, targets)[:, 0], 0).sum()
    kl = torch.zeros_like(cross_entropy)
    scale = known[:, None].to(log_q.dtype)
    if p is None:
        gradient = log_q.exp().mul_(ce_weight * scale)
    elif isinstance(p, TopK):
        nats, towards_p = top_k_kl(log_q, p)
        kl = torch.where(known, nats, 0).sum()
        gradient = log_q.exp_().mul_(ce_weight * scale).add_(towards_p.mul_(kl_weight * scale))
    else:
        log_p = _log_softmax(p)
        likely = log_p.exp()
        kl = torch.where(known, (log_p.sub_(log_q)).mul_(likely).sum(1), 0).sum()
        gradient = log_q.exp_().mul_((ce_weight + kl_weight) * scale)
        gradient.sub_(likely.mul_(kl_weight * scale))
    if ce_weight:
        gradient.scatter_add_(1, targets, -ce_weight * scale)
    return gradient.to(q.dtype), cross_entropy, kl


def _softened_kl(
    q: Tensor, p: Tensor, known: Tensor, kl_weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Arguments as for `_chunk_loss`. Returns kl_weight times the gradient of T^2 KL_T towards q,
    (n, V) in q's dtype, and the sum of T^2 KL_T."""
    log_q, log_p = (
        _log_softmax(logits.to(_at_least_fp32(logits.dtype)) / temperature) for logits in (q, p)
    )
    likely = log_p.exp()
    divergence = ((log_p - log_q) * likely).sum(1) * temperature**2
    gradient = (log_q.exp() - likely) * (kl_weight * temperature * known[:, None])
    return gradient.to(q.dtype), torch.where(known, divergence, 0).sum()


@cache
def _compiled_softened_kl() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_softened_kl, dynamic=True)


@cache
def _compiled_chunk_loss() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_chunk_loss, dynamic=True)


def _chunks(
    model: Head, labels: Tensor, parent: Head | None
) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor, Tensor]]:
    """Places in the flat (B * (T - 1),) tokens, (n, V) logits of model and parent, (n, 1) targets,
    (n,) whether they count. In chunks of nearly one size."""
    with torch.no_grad():
        targets = labels[:, 1:].flatten()
        known = targets != IGNORED
        targets = torch.where(known, targets, 0)[:, None]
        heads = [head for head in (model, parent) if head is not None]
        matrices = [head.weight.to(_product_dtype(head.hidden)) for head in heads]
        states = [
            head.hidden[:, :-1].flatten(0, 1).to(matrix.dtype)
            for head, matrix in zip(heads, matrices, strict=True)
        ]
        at_once = LOGITS_AT_ONCE.get(labels.device.type, LOGITS_AT_ONCE["cuda"])
        count = -(-targets.numel() * len(model.weight) // at_once)
        size = -(-targets.numel() // max(1, count))
        for first in range(0, len(targets), max(1, size)):
            part = slice(first, first + size)
            logits = [x[part] @ w.mT for x, w in zip(states, matrices, strict=True)]
            yield part, logits[0], None if parent is None else logits[1], targets[part], known[part]


def _log_softmax(logits: Tensor) -> Tensor:
    """(n, V) log-probabilities, at least fp32, in memory of their own."""
    return logits.to(_at_least_fp32(logits.dtype)).log_softmax(1)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What autocast would multiply x in."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
