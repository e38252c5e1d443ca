"""How the heads and neurons of a dense layer are assigned to blocks."""

import math
from collections import Counter
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molcli.fitting.partition import BlockPart, num_thin_kv_heads, partition
from molcli.model.shapes import BlockShape


class Case(NamedTuple):
    """Blocks, and the dense layer that is divided among them."""

    shapes: list[BlockShape]
    dense: BlockShape

    @property
    def group(self) -> int:
        """Query heads for each key-value head of the dense layer."""
        return self.dense.num_heads // self.dense.num_kv_heads


def shape(num_heads: int, d_ff: int, num_kv_heads: int = 1) -> BlockShape:
    """What a partition does not depend on is 1."""
    return BlockShape(1, num_heads, num_kv_heads, 1, d_ff)


@st.composite
def cases(draw: st.DrawFn, *, unequal: bool = True) -> Case:
    kv_heads, group = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    d_ff = draw(st.integers(1, 20))
    one = st.builds(shape, st.integers(1, kv_heads * group), st.integers(1, d_ff))
    shapes = draw(
        st.lists(one, min_size=1, max_size=6)
        if unequal
        else st.builds(lambda one, count: [one] * count, one, st.integers(1, 6))
    )
    return Case(shapes, shape(kv_heads * group, d_ff, kv_heads))


@given(case=cases())
def test_every_block_has_its_size(case: Case) -> None:
    """And has no head or neuron twice."""
    parts = partition(*case)
    for part, block in zip(parts, case.shapes, strict=True):
        assert len(set(part.heads)) == len(part.heads) == block.num_heads
        assert len(set(part.neurons)) == len(part.neurons) == block.d_ff
        assert len(part.kv_heads) == num_thin_kv_heads(block.num_heads, case.dense)


@given(case=cases())
def test_a_query_head_keeps_its_key_value_head(case: Case) -> None:
    """Thin attention gives query head i the key-value head i // (heads / kv heads)."""
    for part in partition(*case):
        thin_group = len(part.heads) // len(part.kv_heads)
        for i, head in enumerate(part.heads):
            assert part.kv_heads[i // thin_group] == head // case.group


@given(case=cases(unequal=False))
def test_all_heads_and_neurons_are_used_before_any_repeats(case: Case) -> None:
    parts = partition(*case)
    for size, used in (
        (case.dense.num_heads, Counter(h for part in parts for h in part.heads)),
        (case.dense.d_ff, Counter(n for part in parts for n in part.neurons)),
    ):
        times = [used[i] for i in range(size)]
        assert set(used) <= set(range(size))
        assert max(times) - min(times) <= 1


@given(case=cases())
def test_parts_of_unequal_sizes_leave_no_gap(case: Case) -> None:
    """No head is left out between two parts, and neurons follow each other. A part of whole groups
    begins at a group, and so repeats less than one group."""
    parts, parent = partition(*case), case.dense
    neurons = [n for part in parts for n in part.neurons]
    assert neurons == [i % parent.d_ff for i in range(len(neurons))]
    end = 0
    for part in parts:
        again = (end - part.heads[0]) % parent.num_heads
        unit = math.gcd(len(part.heads), case.group)
        assert again < unit
        end = (part.heads[-1] + 1) % parent.num_heads


@given(case=cases())
def test_whole_groups_need_no_copies(case: Case) -> None:
    """Blocks of whole groups copy no key-value head."""
    for part in partition(*case):
        if len(part.heads) % case.group == 0:
            assert len(set(part.kv_heads)) == len(part.kv_heads) == len(part.heads) // case.group


@pytest.mark.parametrize(
    "sizes, expected",
    [
        # SmolLM2's 9 query heads on 3: a group each, round and round.
        ([(3, 2)] * 2, [BlockPart((0, 1, 2), (0,), (0, 1)), BlockPart((3, 4, 5), (1,), (2, 0))]),
        # 4 heads do not make whole groups: a key-value head for each query head.
        (
            [(4, 2)] * 2,
            [
                BlockPart((0, 1, 2, 3), (0, 0, 0, 1), (0, 1)),
                BlockPart((4, 5, 6, 7), (1, 1, 2, 2), (2, 0)),
            ],
        ),
        # 6 wrap around after a block and a half.
        (
            [(6, 2)] * 2,
            [
                BlockPart((0, 1, 2, 3, 4, 5), (0, 1), (0, 1)),
                BlockPart((6, 7, 8, 0, 1, 2), (2, 0), (2, 0)),
            ],
        ),
        # All heads in the first: the next begins again.
        (
            [(9, 1), (3, 2)],
            [BlockPart(tuple(range(9)), (0, 1, 2), (0,)), BlockPart((0, 1, 2), (0,), (1, 2))],
        ),
        # A whole group after a group and a third begins at the second one, head 3 twice.
        (
            [(4, 1), (3, 1)],
            [BlockPart((0, 1, 2, 3), (0, 0, 0, 1), (0,)), BlockPart((3, 4, 5), (1,), (1,))],
        ),
    ],
)
def test_by_hand(sizes: list[tuple[int, int]], expected: list[BlockPart]) -> None:
    assert partition([shape(*size) for size in sizes], shape(9, 3, 3)) == expected
