"""Order of rows: shuffled epochs, and sources mixed by weight."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from molcli.data.order import MixedOrder, MixtureSchedule, ShuffledOrder

WEIGHTS = st.lists(st.floats(0.01, 100) | st.just(1e-12), min_size=1, max_size=5)


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    drawn = ShuffledOrder(50, seed=0).indices(0, 150).view(3, 50)
    assert all(torch.equal(epoch.sort().values, torch.arange(50)) for epoch in drawn)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[0], ShuffledOrder(50, seed=1).indices(0, 50))


def test_shuffled_order_depends_on_the_position_alone() -> None:
    whole = ShuffledOrder(7, seed=3).indices(0, 40)
    order = ShuffledOrder(7, seed=3)
    assert torch.equal(
        torch.cat([order.indices(31, 9), order.indices(5, 9)]),
        whole[[*range(31, 40), *range(5, 14)]],
    )


@given(weights=WEIGHTS, entries=st.integers(0, 200))
def test_locations_and_counts_agree_and_keep_the_weights(
    weights: list[float], entries: int
) -> None:
    schedule = MixtureSchedule(weights)
    seen = [0] * len(weights)
    for entry in range(entries):
        source, before = schedule.locate(entry)
        assert before == seen[source]
        seen[source] += 1
    assert seen == schedule.counts(entries)
    for source, weight in enumerate(weights):
        # Half an entry of rounding for this source and for each one before it.
        assert abs(seen[source] - entries * weight / sum(weights)) <= 0.501 * (source + 1)


@given(weights=WEIGHTS, data=st.data())
def test_max_without_repeats_is_the_largest_such_number(
    weights: list[float], data: st.DataObject
) -> None:
    count = len(weights)
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
    schedule = MixtureSchedule(weights)
    most = schedule.max_without_repeats(sizes)
    assert all(n <= size for n, size in zip(schedule.counts(most), sizes, strict=True))
    assert any(n > size for n, size in zip(schedule.counts(most + 1), sizes, strict=True))


def test_a_mixture_repeats_each_source_in_epochs_of_its_own() -> None:
    order = MixedOrder([4, 10], MixtureSchedule([1, 1]), seed=0)
    drawn = order.indices(0, 40)
    small, large = drawn[drawn < 4], drawn[drawn >= 4] - 4
    assert len(small) == len(large) == 20
    for epoch in small.view(5, 4):
        assert torch.equal(epoch.sort().values, torch.arange(4))
    assert torch.equal(large, ShuffledOrder(10, seed=0).indices(0, 20))
    later = MixedOrder([4, 10], MixtureSchedule([1, 1]), seed=0)
    for first in (31, 3):
        assert torch.equal(later.indices(first, 9), drawn[first : first + 9])
    assert not torch.equal(
        MixedOrder([4, 10], MixtureSchedule([1, 1]), seed=1).indices(0, 40), drawn
    )


def test_decimal_weights_are_exact() -> None:
    assert MixtureSchedule([0.1, 0.2, 0.7]).counts(10) == [1, 2, 7]
    assert MixtureSchedule([0.7, 0.2, 0.1]).counts(10**15) == [7 * 10**14, 2 * 10**14, 10**14]


def test_a_mixture_of_one_source_has_the_order_of_that_source() -> None:
    assert torch.equal(
        MixedOrder([7], MixtureSchedule([0.3]), seed=3).indices(0, 30),
        ShuffledOrder(7, seed=3).indices(0, 30),
    )
