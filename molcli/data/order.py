"""Step 4, order: from numbers of rows, weights and a seed to the endless sequence of row indices.

Entry i of a sequence depends on i and the seed alone. A resumed run needs only its position.
"""

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor


class MixedOrder:
    """Endless order over the concatenated rows of several sources, mixed by weight.

    Each epoch over a source is a permutation of its rows.

    Args:
        sizes: Number of rows of each source.
        schedule: Decides which source each entry comes from.
        seed: Of the permutations.
    """

    def __init__(self, sizes: Sequence[int], schedule: "MixtureSchedule", seed: int) -> None:
        self._orders = [ShuffledOrder(size, seed) for size in sizes]
        self._offsets = [0, *accumulate(sizes)]
        self._schedule = schedule

    def indices(self, first: int, count: int) -> Tensor:
        """Return entries first to first + count - 1, (count,) int64, as indices of rows."""
        return torch.stack([self._entry(i) for i in range(first, first + count)])

    def _entry(self, entry: int) -> Tensor:
        source, position = self._schedule.locate(entry)
        return self._orders[source].indices(position, 1)[0] + self._offsets[source]


class ShuffledOrder:
    """Endless order over the rows of one source, in which each epoch is a new permutation."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows, self.seed = num_rows, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, first: int, count: int) -> Tensor:
        """Return entries first to first + count - 1, (count,) int64, as indices of rows."""
        return torch.stack([self._entry(i) for i in range(first, first + count)])

    def _entry(self, entry: int) -> Tensor:
        epoch, position = divmod(entry, self.num_rows)
        if epoch != self._epoch:
            # The generator mixes its seed well: neighbouring seeds give unrelated permutations.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._permutation = torch.randperm(self.num_rows, generator=generator)
            self._epoch = epoch
        return self._permutation[position]


class MixtureSchedule:
    """Deterministic interleaving of sources in proportion to their weights.

    Among the first n entries, each source has n times its normalised weight, rounded; the rounding
    error is at most one entry for each source before it. A single batch thus has nearly the same
    mixture as the whole run, and the error does not grow with n.

    Args:
        weights: Above 0, in any unit.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        # Exact fractions of the decimal form (0.7 is 7/10), hence the same on every machine.
        exact = [Fraction(repr(float(weight))) for weight in weights]
        remaining = [sum(exact[k:], Fraction()) for k in range(len(exact))]
        # Source k gets this fraction of the entries that the sources before it leave.
        self._fractions = [weight / rest for weight, rest in zip(exact, remaining, strict=True)]

    def locate(self, entry: int) -> tuple[int, int]:
        """Return (source, number of earlier entries from that source) of an entry."""
        for source, fraction in enumerate(self._fractions):
            before, after = _round(fraction, entry), _round(fraction, entry + 1)
            if after > before:
                return source, before
            entry -= before
        raise AssertionError("the last source has all remaining entries")

    def counts(self, num_entries: int) -> list[int]:
        """Return how many of the first `num_entries` entries come from each source."""
        found = []
        for fraction in self._fractions:
            found.append(_round(fraction, num_entries))
            num_entries -= found[-1]
        return found

    def max_without_repeats(self, sizes: Sequence[int]) -> int:
        """Return the largest number of entries that needs no source for more than its size."""

        def too_many(num_entries: int) -> bool:
            counts = self.counts(num_entries)
            return any(n > size for n, size in zip(counts, sizes, strict=True))

        return bisect_left(range(sum(sizes) + 1), True, key=too_many) - 1


def _round(fraction: Fraction, num_entries: int) -> int:
    """round(num_entries * fraction), halves up: monotonic, and grows by at most one per entry."""
    p, q = fraction.numerator, fraction.denominator
    return (2 * num_entries * p + q) // (2 * q)
