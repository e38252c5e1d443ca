"""The endless sequence of rows that a run sees, from one source or from several by weight.

Entry i depends on i and the seed alone: a run that resumes needs only its place.
"""

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor

from molcli.io.packing import RowOrder


class Shares:
    """Which source each entry of an endless sequence takes: no randomness, no drift.

    Among any first n entries every source has its share of n, rounded, up to one entry for each
    source before it: a batch holds nearly the same mixture as the whole run.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """weights: above 0, in any unit."""
        # As they are written, 0.7 for 7/10: exact, and so the same on every machine.
        exact = [Fraction(repr(float(weight))) for weight in weights]
        left = [sum(exact[k:], Fraction()) for k in range(len(exact))]
        # Source k takes this share of the entries that the sources before it leave.
        self._splits = [(weight / rest) for weight, rest in zip(exact, left, strict=True)]

    def place(self, entry: int) -> tuple[int, int]:
        """(source, how many entries of that source come before)."""
        for source, share in enumerate(self._splits):
            before, after = _taken(share, entry), _taken(share, entry + 1)
            if after > before:
                return source, before
            entry -= before
        raise AssertionError("the last source takes all that is left")

    def counts(self, entries: int) -> list[int]:
        """Entries of each source among the first so many."""
        found = []
        for share in self._splits:
            found.append(_taken(share, entries))
            entries -= found[-1]
        return found

    def before_a_repeat(self, sizes: Sequence[int]) -> int:
        """The most entries that take no source past its size."""

        def too_many(entries: int) -> bool:
            return any(n > size for n, size in zip(self.counts(entries), sizes, strict=True))

        return bisect_left(range(sum(sizes) + 1), True, key=too_many) - 1


class MixedOrder:
    """Entries as rows of the concatenated sources; every pass over a source is a permutation.

    sizes: rows of each source. shares: which source each entry takes.
    """

    def __init__(self, sizes: Sequence[int], shares: Shares, seed: int) -> None:
        self._orders = [RowOrder(size, seed) for size in sizes]
        self._firsts = [0, *accumulate(sizes)]
        self._shares = shares

    def take(self, first: int, count: int) -> Tensor:
        """(count,) int64, entries first to first + count - 1."""
        return torch.stack([self._entry(i) for i in range(first, first + count)])

    def _entry(self, entry: int) -> Tensor:
        source, place = self._shares.place(entry)
        return self._orders[source].take(place, 1)[0] + self._firsts[source]


def _taken(share: Fraction, entries: int) -> int:
    """round(entries * share), halves up, so that it never falls and grows by at most one."""
    p, q = share.numerator, share.denominator
    return (2 * entries * p + q) // (2 * q)
