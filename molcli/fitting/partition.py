"""Assign heads and neurons of a dense layer to the thin blocks that take them over."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from molcli.model.shapes import BlockShape, ShapeConfig, dense_shape, routed_shape, shared_shape


@dataclass(frozen=True)
class BlockPart:
    """The part of a dense layer that one thin block takes over, as indices into that layer.

    heads: query heads. kv_heads: key-value heads, with repeats where the block needs copies.
    neurons: FFN neurons.
    """

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]


def block_parts(config: ShapeConfig) -> list[BlockPart]:
    """Divide the dense layer of a converted model's parent among its active blocks.

    Returns:
        num_shared_blocks parts for the shared blocks, then num_blocks_per_tok parts, one for
        each group of routed blocks.
    """
    shapes = [shared_shape(config)] * config.num_shared_blocks
    shapes += [routed_shape(config)] * config.num_blocks_per_tok
    return partition(shapes, dense_shape(config))


def partition(shapes: Iterable[BlockShape], dense: BlockShape) -> list[BlockPart]:
    """Assign consecutive heads and neurons of a dense layer to blocks of these shapes.

    After the layer's last head or neuron, the assignment continues with its first. Query heads
    that use the same key-value head stay in one part as far as its number of heads allows; after a
    part of another size, a few heads may therefore be assigned a second time.

    Args:
        shapes: of the blocks; num_heads and d_ff are used.
        dense: shape of the dense layer.

    Returns:
        A part for each shape.
    """
    group = dense.num_heads // dense.num_kv_heads
    head = neuron = 0
    parts = []
    for shape in shapes:
        unit = math.gcd(shape.num_heads, group)
        start = head // unit
        units = [
            u % (dense.num_heads // unit) for u in range(start, start + shape.num_heads // unit)
        ]
        parts.append(
            BlockPart(
                heads=tuple(u * unit + j for u in units for j in range(unit)),
                kv_heads=tuple(u * unit // group for u in units),
                neurons=tuple(j % dense.d_ff for j in range(neuron, neuron + shape.d_ff)),
            )
        )
        head, neuron = start * unit + shape.num_heads, neuron + shape.d_ff
    return parts


def num_thin_kv_heads(num_heads: int, dense: BlockShape) -> int:
    """Return how many key-value heads a block with `num_heads` query heads of a dense layer needs.

    Whole groups of query heads use the dense layer's key-value heads as they are. Where num_heads
    is no multiple of a group, smaller groups use copies of a key-value head.
    """
    return num_heads // math.gcd(num_heads, dense.num_heads // dense.num_kv_heads)
