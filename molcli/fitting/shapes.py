"""Choose shapes of thin blocks for a budget of weights.

Inputs: the shape of the parent's dense layer, and the fraction of its weights that the active
blocks may have together. Output: a `BlockShape` of width d_thin, for shared and for routed blocks.
"""

from dataclasses import replace
from math import sqrt

from molcli.fitting.partition import num_thin_kv_heads
from molcli.model.shapes import BlockShape

D_FF_MULTIPLE = 16  # d_ff of a thin block is a multiple of it, which aligns rows of bf16
# Fraction of the active weights that shared blocks have, and of the parent's heads that a routed
# block has. Of the splits tried on SmolLM2-135M at 52% active the best, right after conversion and
# after training (tests/bench/results/shared-shape.md).
SHARED_WEIGHT_FRACTION = 0.7
ROUTED_HEAD_FRACTION = 1 / 8
# Fraction of a token's neurons that the shared slice has. Of 1/3 and 1/2, tried on SmolLM2-135M,
# the better one after training (tests/bench/results/slices.md).
SHARED_SLICE = 1 / 3


def thin_shape(
    fraction: float,
    active: int,
    dense: BlockShape,
    width: int | None = None,
    num_heads: int | None = None,
) -> BlockShape:
    """Choose a block of which `active` have a fraction of the dense layer's weights together.

    Args:
        fraction: of the dense layer's weights, 0 to 1.
        active: number of blocks that see a token.
        dense: shape of the dense layer.
        width: a fixed width; None takes the first of `widths_near` that leaves room for neurons.
        num_heads: a fixed number of query heads; None takes `covering_heads`.

    Returns:
        A shape whose d_ff fills the budget. d_ff is 0 or less where a fixed width leaves no
        room, and D_FF_MULTIPLE where no multiple of head_dim does.
    """
    budget = fraction * dense.num_weights / active
    if num_heads is None:
        num_heads = covering_heads(active, dense)
    if width is not None:
        return make_shape(width, num_heads, max_d_ff(budget, width, num_heads, dense), dense)
    for candidate in widths_near(fraction, active, dense):
        d_ff = max_d_ff(budget, candidate, num_heads, dense)
        if d_ff > 0:
            return make_shape(candidate, num_heads, d_ff, dense)
    return make_shape(dense.head_dim, num_heads, D_FF_MULTIPLE, dense)


def split_shapes(
    fraction: float, num_shared: int, top_k: int, dense: BlockShape
) -> tuple[BlockShape, BlockShape]:
    """Choose one shape for shared blocks and another one for routed blocks.

    Shared blocks hold all of the parent's heads and SHARED_WEIGHT_FRACTION of the active weights;
    routed blocks, which refine what the shared ones leave, have few heads.

    Args:
        fraction: of the dense layer's weights that all active blocks have together.
        num_shared: shared blocks, at least 1.
        top_k: routed blocks that see a token, at least 1.
        dense: shape of the dense layer.

    Returns:
        The shapes of a shared and of a routed block.
    """
    shared_fraction = SHARED_WEIGHT_FRACTION * fraction
    num_heads = cheapest_heads(max(1, int(ROUTED_HEAD_FRACTION * dense.num_heads)), dense)
    routed = thin_shape(fraction - shared_fraction, top_k, dense, num_heads=num_heads)
    shared = _proportional_shape(
        shared_fraction / num_shared, covering_heads(num_shared, dense), dense
    )
    return shared, routed


def slice_neurons(fraction: float, routed: bool, dense: BlockShape) -> tuple[int, int]:
    """Choose the neurons of the shared slice and of a routed one.

    Args:
        fraction: of the dense layer's weights that attention and the two slices of a token have.
        routed: whether there are routed slices; else the shared one has all neurons.
        dense: shape of the dense layer, whose heads are all kept.

    Returns:
        Two numbers, multiples of D_FF_MULTIPLE unless they are few, together at most the dense
        layer's neurons. The second one is 0 or less where attention leaves no room.
    """
    attention = replace(dense, d_ff=0).num_weights
    neurons = int((fraction * dense.num_weights - attention) / (3 * dense.width))
    neurons = min(neurons, dense.d_ff)
    step = D_FF_MULTIPLE if neurons >= 8 * D_FF_MULTIPLE else 1
    neurons = neurons // step * step
    if not routed:
        return neurons, 0
    shared = max(1, round(SHARED_SLICE * neurons / step)) * step
    return shared, neurons - shared


def widths_near(fraction: float, active: int, dense: BlockShape) -> list[int]:
    """List the multiples of head_dim up to d_model, the best guess for `thin_shape` first.

    The guess scales width, heads and neurons by the same s: active (2 d_model^2 s + W s^2) =
    fraction * W for a layer of W weights.
    """
    half = dense.width**2 / dense.num_weights
    scale = sqrt(half**2 + fraction / active) - half
    return sorted(_all_widths(dense), key=lambda width: abs(width - scale * dense.width))


def covering_heads(active: int, dense: BlockShape) -> int:
    """Return the cheapest number of heads with which `active` blocks hold every parent head."""
    return cheapest_heads(-(-dense.num_heads // active), dense)


def cheapest_heads(least: int, dense: BlockShape) -> int:
    """Return the number of query heads, at least `least`, that costs a block the fewest weights.

    Whole groups of query heads need one key-value head each; other numbers need copies, so that 12
    heads in groups of 4 cost less than 11.
    """
    candidates = range(least, dense.num_heads + 1)
    return min(candidates, key=lambda num_heads: num_heads + num_thin_kv_heads(num_heads, dense))


def max_d_ff(budget: float, width: int, num_heads: int, dense: BlockShape) -> int:
    """Return the largest d_ff of a block of at most `budget` weights, thin_in and thin_out
    included; 0 or less where there is no room for neurons."""
    num_kv_heads = num_thin_kv_heads(num_heads, dense)
    # Per unit of the block's width, without neurons.
    weights = 2 * dense.width + 2 * dense.head_dim * (num_heads + num_kv_heads)
    return int((budget / width - weights) / 3 // D_FF_MULTIPLE) * D_FF_MULTIPLE


def make_shape(width: int, num_heads: int, d_ff: int, dense: BlockShape) -> BlockShape:
    """Return the shape of a thin block that takes over heads of a dense layer."""
    num_kv_heads = num_thin_kv_heads(num_heads, dense)
    return BlockShape(width, num_heads, num_kv_heads, dense.head_dim, d_ff)


def _proportional_shape(fraction: float, num_heads: int, dense: BlockShape) -> BlockShape:
    """Choose a block of a fraction of the weights with width / d_model close to the fraction of the
    parent's neurons that it has."""
    candidates = []
    for width in _all_widths(dense):
        d_ff = max_d_ff(fraction * dense.num_weights, width, num_heads, dense)
        if d_ff > 0:
            distance = abs(width / dense.width - d_ff / dense.d_ff)
            candidates.append((distance, make_shape(width, num_heads, d_ff, dense)))
    if not candidates:
        return make_shape(dense.head_dim, num_heads, D_FF_MULTIPLE, dense)
    return min(candidates, key=lambda pair: pair[0])[1]


def _all_widths(dense: BlockShape) -> range:
    return range(dense.head_dim, max(dense.width, dense.head_dim) + 1, dense.head_dim)
