"""Distributions over the vocabulary, stored as k entries and the probability of the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """A distribution per position: k tokens with their probabilities, and one bucket of all others.

    Attributes:
        ids: (..., k) int64, distinct token ids.
        log_probs: (..., k), natural logarithms of their probabilities.
        rest: (...), logarithm of the remaining probability; -inf where k is the whole vocabulary.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor

    def rows(self, part: slice) -> "TopK":
        """Return the positions of a slice of the first dimension."""
        return TopK(self.ids[part], self.log_probs[part], self.rest[part])

    def normalise(self, dtype: torch.dtype) -> "TopK":
        """Convert to a wider dtype and scale to sum 1, which rounding had changed."""
        log_probs, rest = self.log_probs.to(dtype), self.rest.to(dtype)
        total = torch.cat([log_probs, rest[..., None]], -1).logsumexp(-1)
        return TopK(self.ids, log_probs - total[..., None], rest - total)


def truncate_to_top_k(log_p: Tensor, k: int) -> TopK:
    """Keep the k largest entries of each distribution, in descending order.

    Args:
        log_p: (n, V) log-probabilities.
        k: at most V.
    """
    log_probs, ids = log_p.topk(k, dim=1)
    return TopK(ids, log_probs, _without(log_p, ids).logsumexp(1))


def top_k_kl(log_q: Tensor, p: TopK) -> tuple[Tensor, Tensor]:
    """Compute KL(p || q) over k tokens and the bucket of all others, and its gradient.

    By the log-sum inequality, this KL is at most that of the whole distributions. It is equal for
    k = V, and where q distributes its rest as p does.

    Args:
        log_q: (n, V) log-probabilities.
        p: (n, k), in log_q's dtype.

    Returns:
        (n,) nats; and (n, V), the derivatives with respect to the logits of q.
    """
    outside = _without(log_q, p.ids)
    log_rest = outside.logsumexp(1)
    inside = log_q.gather(1, p.ids)
    has_rest = p.rest > -torch.inf
    surplus = torch.where(has_rest, p.rest - log_rest, 0)  # not -inf minus -inf
    kl = (p.log_probs.exp() * (p.log_probs - inside)).sum(1) + p.rest.exp() * surplus
    # Derivatives: q - p for the k tokens; q - q * p_rest / q_rest for the others.
    ratio = torch.where(has_rest, surplus.exp(), 0)
    gradient = outside.exp_().mul_(1 - ratio[:, None])
    gradient.scatter_(1, p.ids, inside.exp() - p.log_probs.exp())
    return kl, gradient


def _without(logs: Tensor, ids: Tensor) -> Tensor:
    """A copy of (n, V) log-probabilities in which the tokens `ids` have probability 0."""
    return logs.scatter(1, ids, -torch.inf)
