"""A distribution over the vocabulary kept as its k largest entries and the mass of the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """A parent's predictions: one set of k tokens a position, and one bucket for all others.

    ids: (..., k) int64, distinct. log_probs: (..., k), natural logarithms. rest: (...), the log of
    the remaining mass; -inf where k is the whole vocabulary.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor

    def rows(self, part: slice) -> "TopK":
        """Some of the positions."""
        return TopK(self.ids[part], self.log_probs[part], self.rest[part])

    def exact(self, dtype: torch.dtype) -> "TopK":
        """In a wider dtype, and of sum 1 again: rounding had moved it."""
        log_probs, rest = self.log_probs.to(dtype), self.rest.to(dtype)
        total = torch.cat([log_probs, rest[..., None]], -1).logsumexp(-1)
        return TopK(self.ids, log_probs - total[..., None], rest - total)


def keep_top_k(log_p: Tensor, k: int) -> TopK:
    """log_p: (n, V) log-probabilities, k <= V; the entries come in falling order."""
    log_probs, ids = log_p.topk(k, dim=1)
    return TopK(ids, log_probs, _outside(log_p, ids).logsumexp(1))


def top_k_kl(log_q: Tensor, p: TopK) -> tuple[Tensor, Tensor]:
    """KL(p || q) over k tokens and the bucket of all others, and its gradient.

    log_q: (n, V) log-probabilities. p: (n, k), in log_q's dtype. Returns (n,) nats, and (n, V) the
    derivatives with respect to the logits of q. By the log-sum inequality the KL is at most that of
    the whole distributions, and equal to it for k = V or where q spreads its rest as p does.
    """
    outside = _outside(log_q, p.ids)
    log_rest = outside.logsumexp(1)
    inside = log_q.gather(1, p.ids)
    has_rest = p.rest > -torch.inf
    surplus = torch.where(has_rest, p.rest - log_rest, 0)  # not -inf less -inf
    kl = (p.log_probs.exp() * (p.log_probs - inside)).sum(1) + p.rest.exp() * surplus
    # Others than the k: q - q * p_rest / q_rest; the k: q - p.
    ratio = torch.where(has_rest, surplus.exp(), 0)
    gradient = outside.exp_().mul_(1 - ratio[:, None])
    gradient.scatter_(1, p.ids, inside.exp() - p.log_probs.exp())
    return kl, gradient


def _outside(logs: Tensor, ids: Tensor) -> Tensor:
    """A copy in which the k entries have no mass."""
    return logs.scatter(1, ids, -torch.inf)
