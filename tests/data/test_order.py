"""Which source and row each entry of a run takes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from molcli.data.mixture import MixedOrder, Shares
from molcli.data.packing import RowOrder

WEIGHTS = st.lists(st.floats(0.01, 100) | st.just(1e-12), min_size=1, max_size=5)


@given(weights=WEIGHTS, entries=st.integers(0, 200))
def test_places_and_counts_agree_and_keep_the_shares(weights: list[float], entries: int) -> None:
    shares = Shares(weights)
    seen = [0] * len(weights)
    for entry in range(entries):
        source, before = shares.place(entry)
        assert before == seen[source]
        seen[source] += 1
    assert seen == shares.counts(entries)
    for source, weight in enumerate(weights):
        # Half an entry of rounding for this source and for each one before it.
        assert abs(seen[source] - entries * weight / sum(weights)) <= 0.501 * (source + 1)


@given(weights=WEIGHTS, data=st.data())
def test_no_source_is_repeated_before_it_must(weights: list[float], data: st.DataObject) -> None:
    count = len(weights)
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
    shares = Shares(weights)
    most = shares.before_a_repeat(sizes)
    assert all(n <= size for n, size in zip(shares.counts(most), sizes, strict=True))
    assert any(n > size for n, size in zip(shares.counts(most + 1), sizes, strict=True))


def test_a_mixture_repeats_each_source_in_passes_of_its_own() -> None:
    order = MixedOrder([4, 10], Shares([1, 1]), seed=0)
    taken = order.take(0, 40)
    small, large = taken[taken < 4], taken[taken >= 4] - 4
    assert len(small) == len(large) == 20
    for epoch in small.view(5, 4):
        assert torch.equal(epoch.sort().values, torch.arange(4))
    assert torch.equal(large, RowOrder(10, seed=0).take(0, 20))
    later = MixedOrder([4, 10], Shares([1, 1]), seed=0)
    for first in (31, 3):
        assert torch.equal(later.take(first, 9), taken[first : first + 9])
    assert not torch.equal(MixedOrder([4, 10], Shares([1, 1]), seed=1).take(0, 40), taken)


def test_decimal_weights_are_exact() -> None:
    assert Shares([0.1, 0.2, 0.7]).counts(10) == [1, 2, 7]
    assert Shares([0.7, 0.2, 0.1]).counts(10**15) == [7 * 10**14, 2 * 10**14, 10**14]


def test_one_source_is_ordered_as_alone() -> None:
    assert torch.equal(
        MixedOrder([7], Shares([0.3]), seed=3).take(0, 30), RowOrder(7, seed=3).take(0, 30)
    )
