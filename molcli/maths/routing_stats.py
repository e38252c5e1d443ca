"""Statistics of routing: how many tokens each block sees, with what weight, and how far apart."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingCounts:
    """Counts of one layer's routing; `+` adds the counts of two batches.

    Attributes:
        tokens: number of routed tokens.
        chosen: (R,) int64, number of tokens that each block sees.
        weight: (R,) float64, sum of their router weights.
        gaps: (R, G) int64, histograms of distances. gaps[b, g] counts the pairs of consecutive
            tokens of one document that block b sees and that are g tokens apart.
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
            _pad_columns(self.gaps, width) + _pad_columns(other.gaps, width),
        )


@dataclass(frozen=True)
class RoutingSummary:
    """Figures of one layer's routing; lists have one entry per routed block.

    A gap is the distance in tokens from a token that a block sees to the next one that it sees in
    the same document; 1 means adjacent tokens. A 95th percentile is the smallest gap that 95 in 100
    gaps do not exceed. Figures are None where no token, or no pair of tokens, was seen.

    Attributes:
        tokens: number of routed tokens.
        load_share: share of all assignments that goes to the block; sums to 1.
        coverage: share of all tokens that the block sees.
        entropy: of load_share, over that of a uniform load; 1 is uniform.
        dead_blocks: indices of blocks whose load is below the threshold.
        mean_weight: mean router weight over the tokens that the block sees.
        mean_gap: mean of the block's gaps.
        p95_gap: 95th percentile of the block's gaps.
        layer_mean_gap: mean over all blocks' gaps.
        layer_p95_gap: 95th percentile over all blocks' gaps.
        even_gap: mean gap of a block that sees as many tokens as under uniform routing.
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
    """Count the routing of one batch.

    Args:
        blocks: (n, k) int64 indices of chosen blocks, distinct within a row.
        weights: (n, k) router weights.
        document_ids: (n,) in the order of the text; a document's tokens are consecutive.
        num_blocks: number of routed blocks, R.
    """
    tokens, top_k = blocks.shape
    flat = blocks.flatten()
    # A stable sort by block keeps the text's order inside each block.
    order = flat.sort(stable=True).indices
    token = order // top_k
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
    """Compute a layer's routing figures from its counts.

    Args:
        counts: of at least one token.
        dead_share: a block with less than this share of the uniform load counts as dead; a block
            without any token always does.
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
    """Compute the mean difference between the lowest chosen and the highest rejected score.

    Near 0, a small change of the residual changes the routing.

    Args:
        scores: (n, R) scores; each row's top_k highest are chosen.
        top_k: number of chosen blocks.

    Returns:
        Mean over tokens, or None where every block is chosen.
    """
    if scores.shape[1] <= top_k:
        return None
    best = scores.topk(top_k + 1, dim=1).values
    return (best[:, top_k - 1] - best[:, top_k]).mean().item()


def _pad_columns(gaps: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(gaps, (0, width - gaps.shape[1]))


def _entropy(share: Tensor) -> float:
    """Entropy of a distribution (R,) over log R; 1 for a single block."""
    if len(share) == 1:
        return 1.0
    return float(-torch.xlogy(share, share).sum()) / math.log(len(share))


def _mean(histogram: Tensor) -> float | None:
    """Mean of the values that a histogram (G,) counts, None if it is empty."""
    total = int(histogram.sum())
    if total == 0:
        return None
    return int((histogram * torch.arange(len(histogram), device=histogram.device)).sum()) / total


def _percentile(histogram: Tensor, percent: int) -> int | None:
    """Smallest value that `percent` in 100 values of a histogram (G,) do not exceed."""
    total = int(histogram.sum())
    if total == 0:
        return None
    return int((histogram.cumsum(0) < -(-percent * total // 100)).sum())
