"""Shapes of thin blocks for a budget of weights, over parents as they are published."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molcli.fitting.partition import partition, thin_kv_heads
from molcli.fitting.shapes import (
    NEURON_UNIT,
    SHARED_WEIGHTS,
    DenseShape,
    ThinShape,
    covering_heads,
    split_shapes,
    thin_shape,
)

# d_model, heads, kv_heads, head_dim, d_ff
FAMILIES = {
    "SmolLM2-135M": DenseShape(576, 9, 3, 64, 1536),
    "Qwen3-0.6B": DenseShape(1024, 16, 8, 128, 3072),
    "Qwen2.5-0.5B": DenseShape(896, 14, 2, 64, 4864),
    "Llama-3.2-1B": DenseShape(2048, 32, 8, 64, 8192),
    "Llama-3.2-3B": DenseShape(3072, 24, 8, 128, 8192),
    "Phi-3-mini": DenseShape(3072, 32, 32, 96, 8192),
    "Llama-3.1-8B": DenseShape(4096, 32, 8, 128, 14336),
}
real = st.sampled_from(list(FAMILIES.values()))


@st.composite
def any_dense(draw: st.DrawFn) -> DenseShape:
    kv_heads, group = draw(st.integers(1, 16)), draw(st.integers(1, 8))
    head_dim = draw(st.sampled_from([8, 16, 64, 96, 128]))
    width = draw(st.integers(1, 40)) * head_dim
    return DenseShape(width, kv_heads * group, kv_heads, head_dim, draw(st.integers(1, 20_000)))


@given(real, st.floats(0.3, 0.95), st.integers(2, 4))
def test_of_real_parents_the_share_is_hit_from_below(
    dense: DenseShape, share: float, active: int
) -> None:
    weights = active * dense.thin_weights(thin_shape(share, active, dense))
    one_step = active * 3 * NEURON_UNIT * dense.d_model
    assert share * dense.weights - one_step <= weights <= share * dense.weights


@given(any_dense(), st.floats(0.05, 1), st.integers(1, 8))
def test_every_shape_can_be_cut_from_the_parent(
    dense: DenseShape, share: float, active: int
) -> None:
    thin = thin_shape(share, active, dense)
    assert thin.width % dense.head_dim == 0 and 0 < thin.width <= dense.d_model
    assert thin.neurons % NEURON_UNIT == 0 and thin.neurons > 0
    assert thin.heads % thin_kv_heads(thin.heads, dense.heads, dense.kv_heads) == 0
    parts = partition(
        [(thin.heads, thin.neurons)] * active,
        parent_heads=dense.heads,
        parent_kv_heads=dense.kv_heads,
        parent_d_ff=dense.d_ff,
    )
    assert {head for part in parts for head in part.heads} == set(range(dense.heads))
    assert all(len(part.heads) == len(set(part.heads)) == thin.heads for part in parts)


@given(real, st.floats(0.35, 0.95), st.integers(1, 2), st.integers(1, 3))
def test_shared_and_routed_blocks_split_the_share(
    dense: DenseShape, share: float, shared: int, routed: int
) -> None:
    wide, thin = split_shapes(share, shared, routed, dense)
    budget = share * dense.weights
    for block, count, part in (
        (wide, shared, SHARED_WEIGHTS),
        (thin, routed, 1 - SHARED_WEIGHTS),
    ):
        a_neuron_more = ThinShape(block.width, block.heads, block.neurons + NEURON_UNIT)
        assert count * dense.thin_weights(block) <= part * budget * (1 + 1e-9)
        assert count * dense.thin_weights(a_neuron_more) > part * budget
    assert wide.heads == covering_heads(shared, dense) and thin.heads < wide.heads
    # A wider or a narrower block of as many weights is further from the parent's proportions.
    apart = wide.width / dense.d_model - wide.neurons / dense.d_ff
    other = wide.width + (dense.head_dim if apart < 0 else -dense.head_dim)
    if 0 < other <= dense.d_model:
        left = dense.neurons_within(SHARED_WEIGHTS * budget / shared, other, wide.heads)
        assert left <= 0 or abs(other / dense.d_model - left / dense.d_ff) >= abs(apart)


@given(any_dense(), st.floats(0.01, 1), st.integers(1, 3), st.integers(1, 8))
def test_any_parent_can_be_split(dense: DenseShape, share: float, shared: int, routed: int) -> None:
    for thin in split_shapes(share, shared, routed, dense):
        assert thin.width % dense.head_dim == 0 and 0 < thin.width <= dense.d_model
        assert thin.neurons > 0 and 1 <= thin.heads <= dense.heads


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
def test_heads_come_in_groups_where_that_is_cheaper(name: str, active: int, heads: int) -> None:
    assert covering_heads(active, FAMILIES[name]) == heads


def test_what_is_fixed_stays() -> None:
    dense = FAMILIES["SmolLM2-135M"]
    thin = thin_shape(0.52, 3, dense, width=192, heads=3)
    assert thin == ThinShape(192, 3, 512 - NEURON_UNIT)  # 512 are 51.99% and a fraction more
    assert thin_shape(0.3, 3, dense, width=576).neurons <= 0


def test_full_width_is_the_parents_layer_and_two_projections() -> None:
    for dense in FAMILIES.values():
        whole = ThinShape(dense.d_model, dense.heads, dense.d_ff)
        assert dense.thin_weights(whole) == dense.weights + 2 * dense.d_model**2
