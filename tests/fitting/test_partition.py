"""How the heads and neurons of a dense layer are dealt out to blocks."""

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molcli.fitting.partition import Part, partition, thin_kv_heads


@st.composite
def shapes(draw: st.DrawFn, *, unequal: bool = True) -> dict[str, Any]:
    kv_heads, group = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    d_ff = draw(st.integers(1, 20))
    size = st.tuples(st.integers(1, kv_heads * group), st.integers(1, d_ff))
    return {
        "sizes": draw(
            st.lists(size, min_size=1, max_size=6)
            if unequal
            else st.builds(lambda one, count: [one] * count, size, st.integers(1, 6))
        ),
        "parent_heads": kv_heads * group,
        "parent_kv_heads": kv_heads,
        "parent_d_ff": d_ff,
    }


@given(shape=shapes())
def test_every_block_has_its_size(shape: dict[str, Any]) -> None:
    """Without a head or a neuron twice."""
    parts = partition(**shape)
    for part, (heads, d_ff) in zip(parts, shape["sizes"], strict=True):
        assert len(set(part.heads)) == len(part.heads) == heads
        assert len(set(part.neurons)) == len(part.neurons) == d_ff
        kv_heads = thin_kv_heads(heads, shape["parent_heads"], shape["parent_kv_heads"])
        assert len(part.kv_heads) == kv_heads


@given(shape=shapes())
def test_a_query_head_keeps_its_key_value_head(shape: dict[str, Any]) -> None:
    """Thin attention gives query head i the key-value head i // (heads / kv heads)."""
    group = shape["parent_heads"] // shape["parent_kv_heads"]
    for part in partition(**shape):
        thin_group = len(part.heads) // len(part.kv_heads)
        for i, head in enumerate(part.heads):
            assert part.kv_heads[i // thin_group] == head // group


@given(shape=shapes(unequal=False))
def test_all_is_covered_before_anything_comes_again(shape: dict[str, Any]) -> None:
    parts = partition(**shape)
    for size, used in (
        (shape["parent_heads"], Counter(h for part in parts for h in part.heads)),
        (shape["parent_d_ff"], Counter(n for part in parts for n in part.neurons)),
    ):
        times = [used[i] for i in range(size)]
        assert set(used) <= set(range(size))
        assert max(times) - min(times) <= 1


@given(shape=shapes())
def test_parts_of_unequal_sizes_leave_no_gap(shape: dict[str, Any]) -> None:
    """No head is left out between two parts, and no neuron comes again before its turn. A part of
    whole groups begins at a group, and so takes fewer than one twice."""
    parts, parent = partition(**shape), shape["parent_heads"]
    neurons = [n for part in parts for n in part.neurons]
    assert neurons == [i % shape["parent_d_ff"] for i in range(len(neurons))]
    end = 0
    for part in parts:
        again = (end - part.heads[0]) % parent
        unit = math.gcd(len(part.heads), parent // shape["parent_kv_heads"])
        assert again < unit
        end = (part.heads[-1] + 1) % parent


@given(shape=shapes())
def test_groups_stay_whole_where_they_fit(shape: dict[str, Any]) -> None:
    """Blocks of whole groups copy no key-value head."""
    group = shape["parent_heads"] // shape["parent_kv_heads"]
    for part in partition(**shape):
        if len(part.heads) % group == 0:
            assert len(set(part.kv_heads)) == len(part.kv_heads) == len(part.heads) // group


@pytest.mark.parametrize(
    "sizes, expected",
    [
        # SmolLM2's 9 query heads on 3: a group each, round and round.
        ([(3, 2)] * 2, [Part((0, 1, 2), (0,), (0, 1)), Part((3, 4, 5), (1,), (2, 0))]),
        # 4 heads do not make whole groups: a key-value head for each query head.
        (
            [(4, 2)] * 2,
            [
                Part((0, 1, 2, 3), (0, 0, 0, 1), (0, 1)),
                Part((4, 5, 6, 7), (1, 1, 2, 2), (2, 0)),
            ],
        ),
        # 6 wrap around after a block and a half.
        (
            [(6, 2)] * 2,
            [
                Part((0, 1, 2, 3, 4, 5), (0, 1), (0, 1)),
                Part((6, 7, 8, 0, 1, 2), (2, 0), (2, 0)),
            ],
        ),
        # All heads in the first: the next begins again.
        ([(9, 1), (3, 2)], [Part(tuple(range(9)), (0, 1, 2), (0,)), Part((0, 1, 2), (0,), (1, 2))]),
        # A whole group after a group and a third begins at the second one, head 3 twice.
        ([(4, 1), (3, 1)], [Part((0, 1, 2, 3), (0, 0, 0, 1), (0,)), Part((3, 4, 5), (1,), (1,))]),
    ],
)
def test_by_hand(sizes: list[tuple[int, int]], expected: list[Part]) -> None:
    assert partition(sizes, parent_heads=9, parent_kv_heads=3, parent_d_ff=3) == expected
