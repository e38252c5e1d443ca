"""How the heads and neurons of a dense layer are dealt out to blocks."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from molcli.maths.partition import Part, partition, thin_kv_heads


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, group = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    d_ff = draw(st.integers(1, 20))
    return {
        "count": draw(st.integers(1, 6)),
        "heads": draw(st.integers(1, kv_heads * group)),
        "d_ff": draw(st.integers(1, d_ff)),
        "parent_heads": kv_heads * group,
        "parent_kv_heads": kv_heads,
        "parent_d_ff": d_ff,
    }


@given(shape=shapes())
def test_every_block_has_its_size(shape: dict[str, Any]) -> None:
    """Without a head or a neuron twice."""
    parts = partition(**shape)
    assert len(parts) == shape["count"]
    kv_heads = thin_kv_heads(shape["heads"], shape["parent_heads"], shape["parent_kv_heads"])
    for part in parts:
        assert len(set(part.heads)) == len(part.heads) == shape["heads"]
        assert len(set(part.neurons)) == len(part.neurons) == shape["d_ff"]
        assert len(part.kv_heads) == kv_heads


@given(shape=shapes())
def test_a_query_head_keeps_its_key_value_head(shape: dict[str, Any]) -> None:
    """Thin attention gives query head i the key-value head i // (heads / kv heads)."""
    group = shape["parent_heads"] // shape["parent_kv_heads"]
    for part in partition(**shape):
        thin_group = len(part.heads) // len(part.kv_heads)
        for i, head in enumerate(part.heads):
            assert part.kv_heads[i // thin_group] == head // group


@given(shape=shapes())
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
def test_groups_stay_whole_where_they_fit(shape: dict[str, Any]) -> None:
    """Blocks of whole groups copy no key-value head."""
    group = shape["parent_heads"] // shape["parent_kv_heads"]
    assume(shape["heads"] % group == 0)
    for part in partition(**shape):
        assert len(set(part.kv_heads)) == len(part.kv_heads) == shape["heads"] // group


@pytest.mark.parametrize(
    "heads, expected",
    [
        # SmolLM2's 9 query heads on 3: a group each, round and round.
        (3, [Part((0, 1, 2), (0,), (0, 1)), Part((3, 4, 5), (1,), (2, 0))]),
        # 4 heads do not make whole groups: a key-value head for each query head.
        (4, [Part((0, 1, 2, 3), (0, 0, 0, 1), (0, 1)), Part((4, 5, 6, 7), (1, 1, 2, 2), (2, 0))]),
        # 6 wrap around after a block and a half.
        (
            6,
            [
                Part((0, 1, 2, 3, 4, 5), (0, 1), (0, 1)),
                Part((6, 7, 8, 0, 1, 2), (2, 0), (2, 0)),
            ],
        ),
    ],
)
def test_by_hand(heads: int, expected: list[Part]) -> None:
    found = partition(2, heads=heads, d_ff=2, parent_heads=9, parent_kv_heads=3, parent_d_ff=3)
    assert found == expected
