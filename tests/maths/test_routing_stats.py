"""Routing statistics against a count by hand, token by token."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from molcli.maths.routing_stats import RoutingCounts, count_routing, routing_margin, summarise


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """blocks (n, k), weights (n, k), document_ids (n,), R. Weights are eighths: sums are exact."""
    num_blocks = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, num_blocks))
    tokens = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # A power skews the choice, so that dead blocks and long gaps come up.
    skew = draw(st.sampled_from([0.0, 1.0, 8.0]))
    scores = torch.rand(tokens, num_blocks, generator=generator) + skew * torch.rand(
        num_blocks, generator=generator
    )
    blocks = scores.topk(top_k).indices
    weights = torch.randint(0, 9, (tokens, top_k), generator=generator) / 8
    documents = (torch.rand(tokens, generator=generator) < 0.2).long().cumsum(0)
    return blocks, weights, documents, num_blocks


def gaps_by_hand(blocks: Tensor, documents: Tensor, block: int) -> list[int]:
    """Distances between a token that sees the block and the next one of its document."""
    seen = [i for i in range(len(blocks)) if block in blocks[i].tolist()]
    return [b - a for a, b in pairwise(seen) if documents[a] == documents[b]]


@given(routings())
def test_counts_match_a_count_by_hand(routing: tuple[Tensor, Tensor, Tensor, int]) -> None:
    blocks, weights, documents, num_blocks = routing
    counts = count_routing(blocks, weights, documents, num_blocks)
    assert counts.tokens == len(blocks)
    for block in range(num_blocks):
        assert counts.chosen[block] == (blocks == block).sum()
        assert counts.weight[block] == weights[blocks == block].sum()
        gaps = gaps_by_hand(blocks, documents, block)
        for gap in range(counts.gaps.shape[1]):
            assert counts.gaps[block, gap] == gaps.count(gap)
        assert counts.gaps[block].sum() == len(gaps)


@given(routings(), st.integers(0, 40))
def test_batches_cut_between_documents_add_up(
    routing: tuple[Tensor, Tensor, Tensor, int], near: int
) -> None:
    blocks, weights, documents, num_blocks = routing
    cut = int((documents < documents[min(near, len(documents) - 1)]).sum())
    whole = count_routing(blocks, weights, documents, num_blocks)
    parts = count_routing(blocks[:cut], weights[:cut], documents[:cut], num_blocks)
    parts += count_routing(blocks[cut:], weights[cut:], documents[cut:], num_blocks)
    assert parts.tokens == whole.tokens
    assert parts.chosen.equal(whole.chosen)
    assert parts.weight.equal(whole.weight)
    assert parts.gaps.equal(whole.gaps)


@given(routings())
def test_summary_matches_figures_by_hand(routing: tuple[Tensor, Tensor, Tensor, int]) -> None:
    blocks, weights, documents, num_blocks = routing
    tokens, top_k = blocks.shape
    summary = summarise(count_routing(blocks, weights, documents, num_blocks), dead_share=0.0)
    loads = [int((blocks == block).sum()) for block in range(num_blocks)]
    assert summary.load_share == pytest.approx([load / (tokens * top_k) for load in loads])
    assert summary.coverage == pytest.approx([load / tokens for load in loads])
    assert summary.dead_blocks == [block for block, load in enumerate(loads) if load == 0]
    assert summary.even_gap == num_blocks / top_k
    if num_blocks > 1:
        parts = [load / (tokens * top_k) for load in loads if load]
        entropy = -sum(p * math.log(p) for p in parts) / math.log(num_blocks)
        assert summary.entropy == pytest.approx(entropy)
    pooled: list[int] = []
    for block in range(num_blocks):
        gaps = sorted(gaps_by_hand(blocks, documents, block))
        pooled += gaps
        if loads[block]:
            assert summary.mean_weight[block] == weights[blocks == block].double().mean()
        if gaps:
            assert summary.mean_gap[block] == sum(gaps) / len(gaps)
            assert summary.p95_gap[block] == gaps[math.ceil(0.95 * len(gaps)) - 1]
        else:
            assert summary.mean_gap[block] is summary.p95_gap[block] is None
    pooled.sort()
    if pooled:
        assert summary.layer_mean_gap == sum(pooled) / len(pooled)
        assert summary.layer_p95_gap == pooled[math.ceil(0.95 * len(pooled)) - 1]


def test_two_blocks_that_alternate() -> None:
    blocks = torch.tensor([[0], [1]] * 4)
    summary = summarise(count_routing(blocks, torch.ones(8, 1), torch.zeros(8), 2), dead_share=0.01)
    assert summary.entropy == 1.0
    assert summary.mean_gap == [2.0, 2.0]
    assert summary.dead_blocks == []


def test_a_gap_does_not_reach_into_the_next_document() -> None:
    blocks = torch.zeros(4, 1, dtype=torch.long)
    documents = torch.tensor([0, 0, 1, 1])
    counts = count_routing(blocks, torch.ones(4, 1), documents, 1)
    assert counts.gaps.tolist() == [[0, 2]]


def test_blocks_below_a_share_of_the_uniform_load_are_dead() -> None:
    counts = RoutingCounts(
        tokens=1000,
        chosen=torch.tensor([995, 4, 1, 0]),
        weight=torch.zeros(4, dtype=torch.float64),
        gaps=torch.zeros(4, 1, dtype=torch.long),
    )
    assert summarise(counts, dead_share=0.01).dead_blocks == [2, 3]  # 0.01 of 250 tokens is 2.5
    assert summarise(counts, dead_share=0.0).dead_blocks == [3]


def test_one_block_counts_as_evenly_loaded() -> None:
    blocks = torch.zeros(3, 1, dtype=torch.long)
    summary = summarise(count_routing(blocks, torch.ones(3, 1), torch.zeros(3), 1), dead_share=0)
    assert summary.entropy == 1.0
    assert summary.layer_mean_gap == 1.0


def test_margin_is_between_the_lowest_chosen_and_the_highest_rejected() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.5], [0.0, 0.25, 4.0]])
    assert routing_margin(scores, 1) == pytest.approx((0.5 + 3.75) / 2)
    assert routing_margin(scores, 2) == pytest.approx((1.5 + 0.25) / 2)
    assert routing_margin(scores, 3) is None
