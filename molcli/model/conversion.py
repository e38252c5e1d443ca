"""From a recipe and the numbers of a parent to the configuration of the converted model."""

from dataclasses import replace
from typing import Any

from molcli.config.layer_choice import chosen_layers, refuse_beyond
from molcli.config.sections import UpcycleConfig
from molcli.errors import MolError
from molcli.maths.partition import thin_kv_heads
from molcli.maths.shapes import (
    DenseShape,
    ThinShape,
    cheapest_heads,
    covering_heads,
    split_shapes,
    thin_shape,
)
from molcli.model.configuration_mol import MoLConfig

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
        "layer_kinds": [_kind(i in converted, i in deltanet) for i in range(layers)],
        "num_blocks": options.num_blocks,
        "num_shared_blocks": options.num_shared_blocks,
        "num_blocks_per_tok": top_k,
        "d_thin": thin.width,
        "d_ff_thin": thin.neurons,
        "thin_num_attention_heads": thin.heads,
        "thin_num_key_value_heads": thin_kv_heads(thin.heads, shape.heads, shape.kv_heads),
        "d_thin_shared": options.d_thin_shared,
        "d_ff_thin_shared": options.d_ff_thin_shared,
    }
    if options.num_heads_shared is not None:
        heads = options.num_heads_shared
        changed["shared_num_attention_heads"] = heads
        changed["shared_num_key_value_heads"] = thin_kv_heads(heads, shape.heads, shape.kv_heads)
    return MoLConfig(**(dense | changed))


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


def _kind(converted: bool, deltanet: bool) -> str:
    if not converted:
        return "dense"
    return "gated_deltanet" if deltanet else "softmax"
