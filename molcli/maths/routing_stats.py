"""Which tokens a routed block sees: how many, with what weight, and how far apart."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingCounts:
    """What one layer's routing adds up to; `+` joins the counts of two batches.

    tokens: tokens routed. chosen: (R,) int64, tokens that each block sees. weight: (R,) float64,
    sum of their router weights. gaps: (R, G) int64; gaps[b, g] counts the pairs of consecutive
    tokens of one document that block b sees, g tokens apart.
    """

    tokens: int
    chosen: Tensor
    weight: Tensor
    gaps: Tensor

    def __add__(self, other: "RoutingCounts") -> "RoutingCounts":
        width = max(self.gaps.shape[1], other.gaps.shape[1])
        return RoutingCounts(
            self.tokens + other.tokens,
            self.chosen + other.chosen,
            self.weight + other.weight,
            _widened(self.gaps, width) + _widened(other.gaps, width),
        )


@dataclass(frozen=True)
class RoutingSummary:
    """One layer's routing; lists have one entry per routed block.

    load_share: part of all visits that goes to the block, sums to 1. coverage: part of all tokens
    that the block sees. entropy: of load_share, over that of a uniform load (1 is uniform).
    dead_blocks: those below the threshold. mean_weight: mean router weight over the tokens that
    the block sees. mean_gap, p95_gap: tokens from one that the block sees to the next in the same
    document (1: it sees both neighbours); the percentile is the smallest gap that 95 in 100 do not
    exceed. None where no token, or no pair of tokens, was seen. layer_mean_gap, layer_p95_gap:
    over all blocks' gaps. even_gap: the mean gap of a block that sees its fair share of tokens.
    """

    tokens: int
    load_share: list[float]
    coverage: list[float]
    entropy: float
    dead_blocks: list[int]
    mean_weight: list[float | None]
    mean_gap: list[float | None]
    p95_gap: list[int | None]
    layer_mean_gap: float | None
    layer_p95_gap: int | None
    even_gap: float


def count_routing(
    blocks: Tensor, weights: Tensor, document_ids: Tensor, num_blocks: int
) -> RoutingCounts:
    """Counts of one batch.

    blocks: (n, k) int64, distinct within a row, below num_blocks (R). weights: (n, k).
    document_ids: (n,), in the order of the text; a document's tokens are consecutive.
    """
    tokens, visits = blocks.shape
    flat = blocks.flatten()
    # A stable sort by block keeps the text's order inside each block.
    order = flat.sort(stable=True).indices
    token = order // visits
    block, document = flat[order], document_ids[token]
    follows = (block[1:] == block[:-1]) & (document[1:] == document[:-1])
    gap = (token[1:] - token[:-1])[follows]
    width = int(gap.max()) + 1 if len(gap) else 1
    cells = block[1:][follows] * width + gap
    return RoutingCounts(
        tokens,
        torch.bincount(flat, minlength=num_blocks),
        torch.bincount(flat, weights=weights.flatten().double(), minlength=num_blocks),
        torch.bincount(cells, minlength=num_blocks * width).view(num_blocks, width),
    )


def summarise(counts: RoutingCounts, *, dead_share: float) -> RoutingSummary:
    """The figures that people read.

    dead_share: a block with less than this part of the uniform load is dead (and one without any
    token always is). counts holds at least one token.
    """
    num_blocks = len(counts.chosen)
    share = counts.chosen.double() / counts.chosen.sum()
    dead = (share < dead_share / num_blocks) | (counts.chosen == 0)
    return RoutingSummary(
        tokens=counts.tokens,
        load_share=share.tolist(),
        coverage=(counts.chosen.double() / counts.tokens).tolist(),
        entropy=_entropy(share),
        dead_blocks=dead.nonzero().flatten().tolist(),
        mean_weight=[
            weight / chosen if chosen else None
            for weight, chosen in zip(counts.weight.tolist(), counts.chosen.tolist(), strict=True)
        ],
        mean_gap=[_mean(row) for row in counts.gaps],
        p95_gap=[_percentile(row, 95) for row in counts.gaps],
        layer_mean_gap=_mean(counts.gaps.sum(0)),
        layer_p95_gap=_percentile(counts.gaps.sum(0), 95),
        even_gap=num_blocks * counts.tokens / int(counts.chosen.sum()),
    )


def routing_margin(scores: Tensor, top_k: int) -> float | None:
    """How far the last chosen block is ahead of the first one that is not: mean over tokens.

    scores: (n, R), what blocks are chosen by; the top_k highest of a row are. None where every
    block is chosen. Near 0, a small change of the residual changes the routing.
    """
    if scores.shape[1] <= top_k:
        return None
    best = scores.topk(top_k + 1, dim=1).values
    return (best[:, top_k - 1] - best[:, top_k]).mean().item()


def _widened(gaps: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(gaps, (0, width - gaps.shape[1]))


def _entropy(share: Tensor) -> float:
    """Of a distribution (R,), over log R; 1 where there is only one block."""
    if len(share) == 1:
        return 1.0
    return float(-torch.xlogy(share, share).sum()) / math.log(len(share))


def _mean(histogram: Tensor) -> float | None:
    """Mean of the values that a histogram (G,) counts; None if it is empty."""
    total = int(histogram.sum())
    if total == 0:
        return None
    return int((histogram * torch.arange(len(histogram), device=histogram.device)).sum()) / total


def _percentile(histogram: Tensor, percent: int) -> int | None:
    """The smallest value that `percent` in 100 of what a histogram (G,) counts do not exceed."""
    total = int(histogram.sum())
    if total == 0:
        return None
    return int((histogram.cumsum(0) < -(-percent * total // 100)).sum())
