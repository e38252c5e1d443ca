"""Choose the shape of thin blocks for a budget of weights, and the converted configuration."""

from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

from molcli.config.layer_choice import chosen_layers, refuse_beyond
from molcli.config.sections import UpcycleConfig
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.fitting.partition import Part, partition, thin_kv_heads
from molcli.model.configuration_mol import MoLConfig
from molcli.model.shapes import routed_shape, shared_shape

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


# Share of a layer's weights that its active blocks have together. `balanced` is about what the
# paper's rule gives (arXiv 2605.09516: active blocks * d_thin ~ d_model), which it follows to the
# letter where all blocks have one shape.
ACTIVE_SHARE = {"quality": 0.75, "balanced": 0.525, "fast": 0.375}


def converted_config(dense: dict[str, Any], options: UpcycleConfig) -> MoLConfig:
    """The converted model's configuration, nulls resolved.

    dense: arguments of the MoLConfig of the parent. Layers that `gated_deltanet: auto` will decide
    count as softmax; those that `layers: auto` will, as the middle ones. Raises MolError where the
    options do not fit the parent.
    """
    layers = dense["num_hidden_layers"]
    top_k, shape = options.chosen_top_k, dense_shape(dense)
    if options.splits_shapes:
        share = ACTIVE_SHARE[options.preset]
        wide, thin = split_shapes(share, options.num_shared_blocks, top_k, shape)
        options = replace(
            options,
            d_thin_shared=wide.width,
            d_ff_thin_shared=wide.neurons,
            num_heads_shared=wide.heads,
        )
    else:
        thin = _thin_shape(options, shape, options.num_shared_blocks + top_k)
    converted = set(range(layers))
    if options.layers in ("middle", "auto"):
        converted = set(middle_layers(layers, options.layers_budget))
    elif not isinstance(options.layers, str):
        converted = set(options.layers)
        refuse_beyond("upcycle.layers", options.layers, layers)
    if not isinstance(options.gated_deltanet, str):
        refuse_beyond("upcycle.gated_deltanet", options.gated_deltanet, layers)
    deltanet = chosen_layers(options.gated_deltanet, sorted(converted))
    changed: dict[str, Any] = {
        "layer_structures": ["mixture" if i in converted else "dense" for i in range(layers)],
        "layer_mixers": ["gated_deltanet" if i in deltanet else "attention" for i in range(layers)],
        "num_blocks": options.num_blocks,
        "num_shared_blocks": options.num_shared_blocks,
        "num_blocks_per_tok": top_k,
        "d_thin": thin.width,
        "d_ff_thin": thin.neurons,
        "num_heads_thin": thin.heads,
        "num_kv_heads_thin": thin_kv_heads(thin.heads, shape.heads, shape.kv_heads),
        "d_thin_shared": options.d_thin_shared,
        "d_ff_thin_shared": options.d_ff_thin_shared,
    }
    if options.num_heads_shared is not None:
        heads = options.num_heads_shared
        changed["num_heads_shared"] = heads
        changed["num_kv_heads_shared"] = thin_kv_heads(heads, shape.heads, shape.kv_heads)
    config = MoLConfig(**(dense | changed))
    if options.method in ("svd", "pca") and config.output_norms:
        raise MolError(
            f"`upcycle.method` is {options.method}, but the parent has norms behind attention and "
            "FFN, through which weights cannot be projected",
            allowed="fitted or random, for such a parent",
            hint="--set upcycle.method=fitted",
        )
    if options.method == "fitted" and config.num_blocks == 1:
        whole = replace(config.dense_spec(), output_norms=False)
        # A copy of the parent's layers has their norms; fitted blocks have none behind mixer and
        # FFN, since what they are fitted to has passed those of the parent.
        config.output_norms_thin = config.output_norms and config.shared_spec() == whole
    return config


def middle_layers(count: int, share: float) -> range:
    """round(share * count) neighbouring layers: in SmolLM2-135M those that cost least, too."""
    few = round(share * count)
    first = (count - few + 1) // 2
    return range(first, first + few)


def dense_shape(dense: dict[str, Any]) -> DenseShape:
    """Of the parent's layers. dense: at least those numbers of a MoLConfig."""
    return DenseShape(
        d_model=dense["hidden_size"],
        heads=dense["num_attention_heads"],
        kv_heads=dense["num_key_value_heads"],
        head_dim=dense["head_dim"],
        d_ff=dense["intermediate_size"],
    )


def _thin_shape(options: UpcycleConfig, dense: DenseShape, active: int) -> ThinShape:
    """What the options say, and where they are null, what the preset does."""
    for key in ("d_thin", "d_thin_shared"):
        if (width := getattr(options, key)) is not None:
            _check_width(key, width, dense, active)
    for key in ("num_heads_thin", "num_heads_shared"):
        heads = getattr(options, key)
        if heads is not None and heads > dense.heads:
            raise MolError(
                f"`upcycle.{key}` is {heads}, but the parent has {dense.heads} heads",
                allowed=f"1 to {dense.heads}",
                hint=f"--set upcycle.{key}={covering_heads(active, dense)}",
            )
    heads = options.num_heads_thin
    if options.preset == "balanced":
        width = _paper_width(dense, active) if options.d_thin is None else options.d_thin
        found = _in_proportion(width, dense)
    else:
        share = ACTIVE_SHARE[options.preset]
        found = thin_shape(share, active, dense, options.d_thin, heads)
        if found.neurons <= 0 and options.d_ff_thin is None:
            raise MolError(
                f"`upcycle.d_thin` is {found.width}, which leaves no room for neurons within "
                f"`upcycle.preset` {options.preset}, {share:.1%} of the parent's active weights",
                allowed="a smaller upcycle.d_thin, or upcycle.d_ff_thin beside it",
                hint=f"--set upcycle.d_thin={thin_shape(share, active, dense, None, heads).width}",
            )
    return ThinShape(
        found.width,
        found.heads if heads is None else heads,
        found.neurons if options.d_ff_thin is None else options.d_ff_thin,
    )


def _in_proportion(width: int, dense: DenseShape) -> ThinShape:
    """Heads and neurons in the width's share; more heads where that takes fewer weights."""
    share = width / dense.d_model
    heads = cheapest_heads(max(1, round(dense.heads * share)), dense)
    return ThinShape(width, heads, max(1, round(dense.d_ff * share)))


def _paper_width(dense: DenseShape, active: int) -> int:
    heads = min(round(dense.d_model / active / dense.head_dim), dense.d_model // dense.head_dim)
    return max(1, heads) * dense.head_dim


def _check_width(key: str, width: int, dense: DenseShape, active: int) -> None:
    d_model, head_dim = dense.d_model, dense.head_dim
    if width > d_model:
        raise MolError(
            f"`upcycle.{key}` is {width}, but the model's width is {d_model}",
            allowed=f"multiples of head_dim, {head_dim}, up to {d_model}",
            hint=f"--set upcycle.{key}={max(head_dim, d_model // active // head_dim * head_dim)}",
        )
    if width % head_dim:
        below = max(1, width // head_dim) * head_dim
        raise MolError(
            f"`upcycle.{key}` is {width}, but a head is {head_dim} wide",
            allowed=f"multiples of head_dim, {head_dim}, up to {d_model}",
            hint=f"--set upcycle.{key}={below}",
        )


def mol_config(parent: Parent, config: UpcycleConfig) -> MoLConfig:
    """`converted_config` of a parent. Raises MolError where the recipe does not fit it."""
    return converted_config(parent.mol_config_kwargs(), config)


def parts(config: MoLConfig) -> list[Part]:
    """The shares of a dense layer: one per shared block, then one per routed family."""
    shapes = [shared_shape(config)] * config.num_shared_blocks
    shapes += [routed_shape(config)] * config.num_blocks_per_tok
    return partition(
        [(shape.num_heads, shape.d_ff) for shape in shapes],
        parent_heads=config.num_attention_heads,
        parent_kv_heads=config.num_key_value_heads,
        parent_d_ff=config.intermediate_size,
    )


def is_whole(config: MoLConfig) -> bool:
    """Whether the one block is the parent's layer: full width, all heads and neurons."""
    thin, dense = config.shared_spec(), config.dense_spec()
    return config.num_blocks == 1 and thin == dense


def is_copy(config: MoLConfig, options: UpcycleConfig) -> bool:
    """Whether the conversion copies the parent's layers as they are, and needs no text."""
    return is_whole(config) and options.method == "fitted"


def needs_text(config: MoLConfig, options: UpcycleConfig) -> bool:
    """Whether the conversion looks at text: to fit blocks, or to choose layers."""
    if "mixture" not in config.layer_structures or is_copy(config, options):
        return False
    choice = options.gated_deltanet == "auto" and config.num_routed_blocks > 0
    return choice or options.method in ("fitted", "pca")
