"""How wide a thin block is, and how many heads and neurons it has, for a budget of weights.

Three levers cost weights: the width, the heads and the neurons. A block of width w with h query
heads, k key-value heads and f neurons has 2 d_model w + 2 head_dim (h + k) w + 3 f w of them; its
norms and the layer's router, about a thousandth, are left out.
"""

from dataclasses import dataclass
from math import sqrt

from molcli.maths.partition import thin_kv_heads

NEURON_UNIT = 16  # counts of neurons are multiples of it, which aligns rows of bf16
# Of the active weights, in the shared blocks; and of the parent's heads, in a routed block. Of the
# splits tried on SmolLM2-135M at 52% active the best, right after conversion and after training
# (tests/bench/results/shared-shape.md).
SHARED_WEIGHTS = 0.7
ROUTED_HEADS = 1 / 8


@dataclass(frozen=True)
class DenseShape:
    """A dense layer: its width, query and key-value heads, their width, and gated FFN neurons."""

    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int

    @property
    def weights(self) -> int:
        """Of attention and FFN."""
        attention = 2 * self.head_dim * (self.heads + self.kv_heads)
        return self.d_model * (attention + 3 * self.d_ff)

    def thin_weights(self, thin: "ThinShape") -> int:
        """Of one thin block."""
        return thin.width * (self._weights_a_row(thin.heads) + 3 * thin.neurons)

    def neurons_within(self, budget: float, width: int, heads: int) -> int:
        """Neurons of a block of at most `budget` weights; 0 or less where it holds none."""
        left = budget / width - self._weights_a_row(heads)
        return int(left / 3 // NEURON_UNIT) * NEURON_UNIT

    def _weights_a_row(self, heads: int) -> int:
        """Weights for each unit of a thin block's width, but for the neurons."""
        kv_heads = thin_kv_heads(heads, self.heads, self.kv_heads)
        return 2 * self.d_model + 2 * self.head_dim * (heads + kv_heads)


@dataclass(frozen=True)
class ThinShape:
    """Width, query heads and neurons of a thin block."""

    width: int
    heads: int
    neurons: int


def covering_heads(active: int, dense: DenseShape) -> int:
    """The cheapest number of heads with which `active` blocks hold every head of the parent."""
    return cheapest_heads(-(-dense.heads // active), dense)


def cheapest_heads(least: int, dense: DenseShape) -> int:
    """The number of heads, at least `least`, that takes a block the fewest weights.

    Whole groups of query heads need one key-value head each; other numbers need copies, so that 12
    heads in groups of 4 cost less than 11.
    """
    enough = range(least, dense.heads + 1)
    return min(enough, key=lambda h: h + thin_kv_heads(h, dense.heads, dense.kv_heads))


def widths_near(share: float, active: int, dense: DenseShape) -> list[int]:
    """Multiples of head_dim up to d_model, the best guess for `thin_shape` first.

    The guess scales width, heads and neurons alike: s with active (2 d_model^2 s + W s^2) =
    share * W for a layer of W weights.
    """
    half = dense.d_model**2 / dense.weights
    scale = sqrt(half**2 + share / active) - half
    multiples = range(dense.head_dim, max(dense.d_model, dense.head_dim) + 1, dense.head_dim)
    return sorted(multiples, key=lambda width: abs(width - scale * dense.d_model))


def thin_shape(
    share: float, active: int, dense: DenseShape, width: int | None = None, heads: int | None = None
) -> ThinShape:
    """A block of which `active` together have `share` of the dense layer's weights.

    width, heads: fixed ones; None takes the nearest of `widths_near` that leaves room for neurons,
    and `covering_heads`. Neurons fill the budget: 0 or less where a fixed width leaves no room, and
    at least NEURON_UNIT where no multiple of head_dim does.
    """
    budget = share * dense.weights / active
    if heads is None:
        heads = covering_heads(active, dense)
    if width is not None:
        return ThinShape(width, heads, dense.neurons_within(budget, width, heads))
    for candidate in widths_near(share, active, dense):
        neurons = dense.neurons_within(budget, candidate, heads)
        if neurons > 0:
            return ThinShape(candidate, heads, neurons)
    return ThinShape(dense.head_dim, heads, NEURON_UNIT)


def split_shapes(
    share: float, shared: int, routed: int, dense: DenseShape
) -> tuple[ThinShape, ThinShape]:
    """A shared and a routed block, of which `shared` and `routed` have `share` of the dense layer's
    weights together.

    Shared blocks hold all of the parent's heads and SHARED_WEIGHTS of the weights; routed blocks,
    which refine what these leave, few heads. Both at least 1.
    """
    wide = SHARED_WEIGHTS * share
    heads = cheapest_heads(max(1, int(ROUTED_HEADS * dense.heads)), dense)
    thin = thin_shape(share - wide, routed, dense, heads=heads)
    return _wide_shape(wide / shared, covering_heads(shared, dense), dense), thin


def _wide_shape(share: float, heads: int, dense: DenseShape) -> ThinShape:
    """A block of `share` of the weights, whose width is about the share of the parent's width that
    its neurons are of the parent's neurons."""
    found = []
    for width in range(dense.head_dim, max(dense.d_model, dense.head_dim) + 1, dense.head_dim):
        neurons = dense.neurons_within(share * dense.weights, width, heads)
        if neurons > 0:
            apart = abs(width / dense.d_model - neurons / dense.d_ff)
            found.append((apart, ThinShape(width, heads, neurons)))
    if not found:
        return ThinShape(dense.head_dim, heads, NEURON_UNIT)
    return min(found, key=lambda pair: pair[0])[1]
