"""Shapes of thin blocks for a budget of weights, over parents as they are published."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molcli.fitting.partition import partition
from molcli.fitting.shapes import (
    D_FF_MULTIPLE,
    SHARED_WEIGHT_FRACTION,
    covering_heads,
    make_shape,
    max_d_ff,
    split_shapes,
    thin_shape,
)
from molcli.model.shapes import BlockShape

# width, num_heads, num_kv_heads, head_dim, d_ff
FAMILIES = {
    "SmolLM2-135M": BlockShape(576, 9, 3, 64, 1536),
    "Qwen3-0.6B": BlockShape(1024, 16, 8, 128, 3072),
    "Qwen2.5-0.5B": BlockShape(896, 14, 2, 64, 4864),
    "Llama-3.2-1B": BlockShape(2048, 32, 8, 64, 8192),
    "Llama-3.2-3B": BlockShape(3072, 24, 8, 128, 8192),
    "Phi-3-mini": BlockShape(3072, 32, 32, 96, 8192),
    "Llama-3.1-8B": BlockShape(4096, 32, 8, 128, 14336),
}
real = st.sampled_from(list(FAMILIES.values()))


@st.composite
def any_dense(draw: st.DrawFn) -> BlockShape:
    kv_heads, group = draw(st.integers(1, 16)), draw(st.integers(1, 8))
    head_dim = draw(st.sampled_from([8, 16, 64, 96, 128]))
    width = draw(st.integers(1, 40)) * head_dim
    return BlockShape(width, kv_heads * group, kv_heads, head_dim, draw(st.integers(1, 20_000)))


@given(real, st.floats(0.3, 0.95), st.integers(2, 4))
def test_for_real_parents_the_budget_is_filled(
    dense: BlockShape, fraction: float, active: int
) -> None:
    weights = active * thin_shape(fraction, active, dense).num_thin_weights(dense.width)
    one_step = active * 3 * D_FF_MULTIPLE * dense.width
    assert fraction * dense.num_weights - one_step <= weights <= fraction * dense.num_weights


@given(any_dense(), st.floats(0.05, 1), st.integers(1, 8))
def test_every_shape_can_be_partitioned(dense: BlockShape, fraction: float, active: int) -> None:
    thin = thin_shape(fraction, active, dense)
    assert thin.width % dense.head_dim == 0 and 0 < thin.width <= dense.width
    assert thin.d_ff % D_FF_MULTIPLE == 0 and thin.d_ff > 0
    assert thin.num_heads % thin.num_kv_heads == 0
    parts = partition([thin] * active, dense)
    assert {head for part in parts for head in part.heads} == set(range(dense.num_heads))
    assert all(len(part.heads) == len(set(part.heads)) == thin.num_heads for part in parts)
    assert all(len(part.kv_heads) == thin.num_kv_heads for part in parts)


@given(real, st.floats(0.35, 0.95), st.integers(1, 2), st.integers(1, 3))
def test_shared_and_routed_blocks_split_the_budget(
    dense: BlockShape, fraction: float, shared: int, routed: int
) -> None:
    wide, thin = split_shapes(fraction, shared, routed, dense)
    budget = fraction * dense.num_weights
    for block, count, part in (
        (wide, shared, SHARED_WEIGHT_FRACTION),
        (thin, routed, 1 - SHARED_WEIGHT_FRACTION),
    ):
        one_step_more = replace(block, d_ff=block.d_ff + D_FF_MULTIPLE)
        assert count * block.num_thin_weights(dense.width) <= part * budget * (1 + 1e-9)
        assert count * one_step_more.num_thin_weights(dense.width) > part * budget
    assert wide.num_heads == covering_heads(shared, dense) and thin.num_heads < wide.num_heads
    # A wider or a narrower block of as many weights is further from the parent's proportions.
    apart = wide.width / dense.width - wide.d_ff / dense.d_ff
    other = wide.width + (dense.head_dim if apart < 0 else -dense.head_dim)
    if 0 < other <= dense.width:
        left = max_d_ff(SHARED_WEIGHT_FRACTION * budget / shared, other, wide.num_heads, dense)
        assert left <= 0 or abs(other / dense.width - left / dense.d_ff) >= abs(apart)


@given(any_dense(), st.floats(0.01, 1), st.integers(1, 3), st.integers(1, 8))
def test_any_parent_can_be_split(
    dense: BlockShape, fraction: float, shared: int, routed: int
) -> None:
    for thin in split_shapes(fraction, shared, routed, dense):
        assert thin.width % dense.head_dim == 0 and 0 < thin.width <= dense.width
        assert thin.d_ff > 0 and 1 <= thin.num_heads <= dense.num_heads


@pytest.mark.parametrize(
    "name, active, heads",
    [
        ("SmolLM2-135M", 3, 3),  # whole groups of 3
        ("Llama-3.1-8B", 3, 12),  # 11 would need 11 key-value heads, 12 need 3
        ("Qwen2.5-0.5B", 3, 7),
        ("Phi-3-mini", 3, 11),  # a key-value head each: none too many
        ("Llama-3.1-8B", 1, 32),
    ],
)
def test_heads_are_whole_groups_where_that_is_cheaper(name: str, active: int, heads: int) -> None:
    assert covering_heads(active, FAMILIES[name]) == heads


def test_fixed_numbers_are_kept() -> None:
    dense = FAMILIES["SmolLM2-135M"]
    thin = thin_shape(0.52, 3, dense, width=192, num_heads=3)
    assert thin == BlockShape(
        192, 3, 1, 64, 512 - D_FF_MULTIPLE
    )  # 512 are 51.99% and a fraction more
    assert thin_shape(0.3, 3, dense, width=576).d_ff <= 0


def test_full_width_is_the_parents_layer_and_two_projections() -> None:
    for dense in FAMILIES.values():
        whole = make_shape(dense.width, dense.num_heads, dense.d_ff, dense)
        assert whole == dense
        assert whole.num_thin_weights(dense.width) == dense.num_weights + 2 * dense.width**2
