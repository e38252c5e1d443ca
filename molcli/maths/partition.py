"""Which heads and neurons of a dense layer each thin block takes over."""

import math
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
    count: int,
    *,
    heads: int,
    d_ff: int,
    parent_heads: int,
    parent_kv_heads: int,
    parent_d_ff: int,
) -> list[Part]:
    """`count` parts of `heads` query heads and `d_ff` neurons each, one after another; past the
    parent's last head or neuron they start again at its first.

    Query heads that share a key-value head stay together as far as `heads` allows.
    """
    group = parent_heads // parent_kv_heads
    unit = math.gcd(heads, group)
    parts = []
    for i in range(count):
        start = i * (heads // unit)
        units = [u % (parent_heads // unit) for u in range(start, start + heads // unit)]
        parts.append(
            Part(
                heads=tuple(u * unit + j for u in units for j in range(unit)),
                kv_heads=tuple(u * unit // group for u in units),
                neurons=tuple(j % parent_d_ff for j in range(i * d_ff, (i + 1) * d_ff)),
            )
        )
    return parts
