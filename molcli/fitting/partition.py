"""Which heads and neurons of a dense layer each thin block takes over."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One block's share of a dense layer: indices of its query heads, key-value heads, neurons."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]


def thin_kv_heads(heads: int, parent_heads: int, parent_kv_heads: int) -> int:
    """Key-value heads of a block with `heads` query heads: whole groups where they fit, else
    copies of a key-value head for the smaller groups that do."""
    return heads // math.gcd(heads, parent_heads // parent_kv_heads)


def partition(
    sizes: Iterable[tuple[int, int]],
    *,
    parent_heads: int,
    parent_kv_heads: int,
    parent_d_ff: int,
) -> list[Part]:
    """A part for each of `sizes`, its query heads and its neurons: one part after another; past
    the parent's last head or neuron they start again at its first.

    Query heads that share a key-value head stay together as far as a part's heads allow; after a
    part of another size, that may take a few heads a second time.
    """
    group = parent_heads // parent_kv_heads
    head = neuron = 0
    parts = []
    for heads, d_ff in sizes:
        unit = math.gcd(heads, group)
        start = head // unit
        units = [u % (parent_heads // unit) for u in range(start, start + heads // unit)]
        parts.append(
            Part(
                heads=tuple(u * unit + j for u in units for j in range(unit)),
                kv_heads=tuple(u * unit // group for u in units),
                neurons=tuple(j % parent_d_ff for j in range(neuron, neuron + d_ff)),
            )
        )
        head, neuron = start * unit + heads, neuron + d_ff
    return parts
