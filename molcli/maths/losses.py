"""Language-model losses from hidden states, without the logits of a whole batch.

Logits and their gradient are computed together for one chunk of tokens at a time, from hidden
states and the weight of the LM head. Their memory is bounded at any batch size, and no softmax is
computed twice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.maths.top_k import TopK, top_k_kl, truncate_to_top_k

IGNORED = -100  # a label that is left out of every sum
# Tokens times vocabulary of one chunk. On a GPU 256 MiB in fp32, for few kernel launches; on a CPU
# as much as its cache holds.
LOGITS_PER_CHUNK = {"cuda": 2**26, "cpu": 2**24}


@dataclass(frozen=True)
class TokenLosses:
    """Sums over the predicted tokens; scalars, fp32 (float64 for float64 inputs).

    Without a parent, the figures that compare with it are 0.

    Attributes:
        cross_entropy: of the labels, nats.
        kl: KL(parent || model), nats.
        parent_cross_entropy: the parent's cross-entropy of the labels, nats.
        agreement: number of tokens for which model and parent rank the same token first.
        count: number of predicted tokens.
    """

    cross_entropy: Tensor
    kl: Tensor
    parent_cross_entropy: Tensor
    agreement: Tensor
    count: Tensor


@dataclass(frozen=True)
class Head:
    """Inputs of an LM head, whose logits are hidden @ weight.mT.

    Attributes:
        hidden: (B, T, D) hidden states.
        weight: (V, D) weight of the LM head.
    """

    hidden: Tensor
    weight: Tensor


class TrainingLoss(NamedTuple):
    """Sums over the predicted tokens; scalars, fp32 (float64 for float64 inputs).

    Attributes:
        loss: ce_weight * cross_entropy + kl_weight * T^2 KL_T, the only one with a gradient. KL_T
            is the KL between both distributions at temperature T.
        cross_entropy: of the labels, nats.
        kl: KL(parent || model) at temperature 1, nats, whatever T is.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor


@torch.no_grad()
def token_losses(model: Head, labels: Tensor, parent: Head | None = None) -> TokenLosses:
    """Sum next-token cross-entropy and forward KL to the parent's distribution over tokens.

    Logits are multiplied in the dtype of their inputs (or autocast's) and reduced in fp32.

    Args:
        model: hidden states (B, T, D) and head of the model.
        labels: (B, T) int64, aligned with the inputs as in Hugging Face models: the state at t
            predicts the label at t + 1. IGNORED labels count nowhere.
        parent: hidden states and head of the parent. Its width may differ from the model's, its
            vocabulary may not.
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
    """Compute the k most likely next tokens of every position.

    Returns:
        (B, T, k), in fp32 (float64 for float64 inputs).
    """
    weight = model.weight.to(_product_dtype(model.hidden))
    chunk = LOGITS_PER_CHUNK.get(weight.device.type, LOGITS_PER_CHUNK["cuda"])
    states = model.hidden.flatten(0, 1).split(max(1, chunk // len(weight)))
    kept = [truncate_to_top_k(_log_softmax(x.to(weight.dtype) @ weight.mT), k) for x in states]
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
    """Compute the weighted sum of cross-entropy and KL, with its gradient.

    Gradients flow to model.hidden and model.weight only. They are multiplied in the same dtype as
    the logits; the weight's gradient is summed over chunks in fp32.

    Args:
        model: hidden states (B, T, D) and head of the model.
        labels: (B, T) int64, as for `token_losses`.
        parent: hidden states and head of the parent; or a TopK, (B, T, k), for the KL of
            `top_k_kl`; or None.
        ce_weight: factor of the cross-entropy.
        kl_weight: factor of the KL.
        temperature: T of the KL. Its square keeps the size of the gradient. It must be 1 with a
            TopK, which has only the sum of the other tokens' probabilities.
        compiled: fuses the operations on a chunk's logits with torch.compile; for long runs on a
            GPU.

    Source: distillation at a temperature (arXiv 1503.02531).
    """
    assert temperature == 1 or not isinstance(parent, TopK)
    return TrainingLoss(
        *_LossAndGradient.apply(  # type: ignore[no-untyped-call]
            model.hidden, model.weight, labels, parent, ce_weight, kl_weight, temperature, compiled
        )
    )


class _LossAndGradient(torch.autograd.Function):
    """Compute the gradient in the forward pass: for a scalar loss, backward only scales it."""

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
        grad_hidden = torch.zeros_like(states, dtype=hidden.dtype) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=high) if wants_weight else None
        chunk_loss = _compiled_chunk_loss() if compiled else _chunk_loss
        head, top_k = (None, parent) if isinstance(parent, TopK) else (parent, None)
        if top_k is not None:  # like the states, without the last position of every row
            fields = (top_k.ids, top_k.log_probs, top_k.rest)
            top_k = TopK(*(field[:, :-1].flatten(0, 1) for field in fields))
        soft = head is not None and temperature != 1
        softened = _compiled_softened_kl() if compiled else _softened_kl
        sums = hidden.new_zeros(3, dtype=high)  # cross-entropy, KL, T^2 KL_T
        for part, q, p, targets, known in _chunks(Head(hidden, matrix), labels, head):
            target = p if top_k is None else top_k.rows(part).normalise(high)
            hard_weight = 0.0 if soft else kl_weight
            gradient, cross_entropy, kl = chunk_loss(
                q, target, targets, known, ce_weight, hard_weight
            )
            divergence = kl
            if soft:
                assert p is not None
                grad_kl, divergence = softened(q, p, known, kl_weight, temperature)
                gradient = gradient + grad_kl
            sums += torch.stack([cross_entropy, kl, divergence])
            if grad_hidden is not None:
                grad_hidden[part] = gradient @ matrix
            if grad_weight is not None:
                grad_weight += gradient.mT @ states[part]
        if grad_hidden is not None:  # the last position of every row predicts nothing
            grad_hidden = F.pad(grad_hidden.unflatten(0, (hidden.shape[0], -1)), (0, 0, 0, 1))
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight))
        cross_entropy, kl, divergence = sums.unbind()
        loss = ce_weight * cross_entropy + kl_weight * divergence
        ctx.mark_non_differentiable(cross_entropy, kl)
        return loss, cross_entropy, kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * upstream[0],
            None if grad_weight is None else grad_weight * upstream[0],
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
    """Compute one chunk's loss and gradient.

    Args:
        q: (n, V) logits of the model.
        p: (n, V) logits of the parent; or (n, k) of its distribution, at least fp32; or None.
        targets: (n, 1) labels.
        known: (n,) bool, whether a label counts.
        ce_weight: factor of the cross-entropy.
        kl_weight: factor of the KL.

    Returns:
        The gradient of the weighted sum with respect to q, (n, V) in q's dtype; the sums of
        cross-entropy and KL.
    """
    log_q = _log_softmax(q)
    cross_entropy = -torch.where(known, log_q.gather(1, targets)[:, 0], 0).sum()
    kl = torch.zeros_like(cross_entropy)
    scale = known[:, None].to(log_q.dtype)
    if p is None:
        gradient = log_q.exp().mul_(ce_weight * scale)
    elif isinstance(p, TopK):
        nats, grad_kl = top_k_kl(log_q, p)
        kl = torch.where(known, nats, 0).sum()
        gradient = log_q.exp_().mul_(ce_weight * scale).add_(grad_kl.mul_(kl_weight * scale))
    else:
        log_p = _log_softmax(p)
        prob_p = log_p.exp()
        kl = torch.where(known, (log_p.sub_(log_q)).mul_(prob_p).sum(1), 0).sum()
        gradient = log_q.exp_().mul_((ce_weight + kl_weight) * scale)
        gradient.sub_(prob_p.mul_(kl_weight * scale))
    if ce_weight:
        gradient.scatter_add_(1, targets, -ce_weight * scale)
    return gradient.to(q.dtype), cross_entropy, kl


def _softened_kl(
    q: Tensor, p: Tensor, known: Tensor, kl_weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Compute kl_weight times the gradient of T^2 KL_T with respect to q, (n, V) in q's dtype, and
    the sum of T^2 KL_T. Arguments as for `_chunk_loss`."""
    log_q, log_p = (
        _log_softmax(logits.to(_at_least_fp32(logits.dtype)) / temperature) for logits in (q, p)
    )
    prob_p = log_p.exp()
    divergence = ((log_p - log_q) * prob_p).sum(1) * temperature**2
    gradient = (log_q.exp() - prob_p) * (kl_weight * temperature * known[:, None])
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
    """Yield chunks of nearly equal size: their slice of the flat (B * (T - 1),) tokens, (n, V)
    logits of model and parent, (n, 1) targets, and (n,) whether they count."""
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
        chunk = LOGITS_PER_CHUNK.get(labels.device.type, LOGITS_PER_CHUNK["cuda"])
        count = -(-targets.numel() * len(model.weight) // chunk)
        size = -(-targets.numel() // max(1, count))
        for first in range(0, len(targets), max(1, size)):
            part = slice(first, first + size)
            logits = [x[part] @ w.mT for x, w in zip(states, matrices, strict=True)]
            yield part, logits[0], None if parent is None else logits[1], targets[part], known[part]


def _log_softmax(logits: Tensor) -> Tensor:
    """(n, V) log-probabilities, at least fp32, in new memory."""
    return logits.to(_at_least_fp32(logits.dtype)).log_softmax(1)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would multiply x in."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
