"""Derive the converted model's configuration from the parent's and the `upcycle` options.

Inputs: the arguments of the parent's MoLConfig, and an UpcycleConfig whose nulls the preset fills.
Output: a MoLConfig with the structure and the mixer of every layer and the shapes of its blocks.
"""

from dataclasses import replace
from math import ceil
from typing import Any

from molcli.config.layer_choice import chosen_layers, refuse_beyond
from molcli.config.sections import UpcycleConfig
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.fitting.partition import num_thin_kv_heads
from molcli.fitting.shapes import (
    cheapest_heads,
    covering_heads,
    make_shape,
    slice_neurons,
    split_shapes,
    thin_shape,
)
from molcli.model.configuration_mol import MoLConfig
from molcli.model.shapes import BlockShape

# Fraction of a layer's weights that its active blocks have together. `balanced` is about what the
# paper's rule gives (arXiv 2605.09516: active blocks * d_thin ~ d_model), which is applied exactly
# where all blocks have one shape.
ACTIVE_FRACTION = {"quality": 0.75, "balanced": 0.525, "fast": 0.375}
SLICED_FRACTION = {"quality": 0.75, "balanced": 0.5, "fast": 0.375}
# Layers that a sliced conversion leaves out, over the layers' worth of weights that it saves. Of 0,
# 0.4 and 0.67, tried on SmolLM2-135M at 50% active after 7M tokens, the best
# (tests/bench/results/slices.md).
SKIPPED_FRACTION = 0.4
# Fraction of the parent's neurons that a token's slices have at least: more layers are left out
# where attention leaves less room than that.
FEWEST_NEURONS = 1 / 8


def mol_config(parent: Parent, options: UpcycleConfig) -> MoLConfig:
    """Return `converted_config` of a parent. Raises MolError where the options do not fit it."""
    return converted_config(parent.mol_config_kwargs(), options)


def converted_config(dense: dict[str, Any], options: UpcycleConfig) -> MoLConfig:
    """Build the converted model's configuration, nulls resolved.

    Args:
        dense: arguments of the MoLConfig of the parent.
        options: layers that `gated_deltanet: auto` decides later count as attention; those that
            `layers: auto` or `skipped_layers: auto` decides later, as the middle ones.

    Returns:
        A valid configuration.

    Raises:
        MolError: where the options do not fit the parent.
    """
    layers = dense["num_hidden_layers"]
    top_k, parent = options.chosen_top_k, parent_shape(dense)
    choices = _layer_choices(options, layers, parent)
    if options.has_slices:
        routed, options = _slices(options, parent, choices["layer_structures"])
    elif options.splits_shapes:
        fraction = ACTIVE_FRACTION[options.preset]
        shared, routed = split_shapes(fraction, options.num_shared_blocks, top_k, parent)
        options = replace(
            options,
            d_thin_shared=shared.width,
            d_ff_thin_shared=shared.d_ff,
            num_heads_shared=shared.num_heads,
        )
    else:
        routed = _routed_shape(options, parent, options.num_shared_blocks + top_k)
    changed: dict[str, Any] = {
        **choices,
        "num_blocks": options.num_blocks,
        "num_shared_blocks": options.num_shared_blocks,
        "num_blocks_per_tok": top_k,
        "d_thin": routed.width,
        "d_ff_thin": routed.d_ff,
        "num_heads_thin": routed.num_heads,
        "num_kv_heads_thin": routed.num_kv_heads,
        "d_thin_shared": options.d_thin_shared,
        "d_ff_thin_shared": options.d_ff_thin_shared,
    }
    if options.num_heads_shared is not None:
        num_heads = options.num_heads_shared
        changed["num_heads_shared"] = num_heads
        changed["num_kv_heads_shared"] = num_thin_kv_heads(num_heads, parent)
    config = MoLConfig(**(dense | changed))
    if options.method in ("svd", "pca") and config.output_norms:
        raise MolError(
            f"`upcycle.method` is {options.method}, but the parent has norms behind attention and "
            "FFN, through which weights cannot be projected",
            allowed="fitted or random, for such a parent",
            hint="--set upcycle.method=fitted",
        )
    if options.method == "fitted" and config.num_blocks == 1 and not config.has_slices:
        whole = replace(config.dense_spec(), output_norms=False)
        # A copy of the parent's layers has their norms. Fitted blocks have none behind mixer and
        # FFN, since their targets have passed those of the parent.
        config.output_norms_thin = config.output_norms and config.shared_spec() == whole
    return config


def parent_shape(dense: dict[str, Any]) -> BlockShape:
    """Return the shape of the parent's layers. dense: arguments of a MoLConfig, at least these."""
    return BlockShape(
        width=dense["hidden_size"],
        num_heads=dense["num_attention_heads"],
        num_kv_heads=dense["num_key_value_heads"],
        head_dim=dense["head_dim"],
        d_ff=dense["intermediate_size"],
    )


def is_copy(config: MoLConfig, options: UpcycleConfig) -> bool:
    """Return whether the conversion copies the parent's layers unchanged, which needs no text.

    It does if the only thin block has the shape of the parent's layer.
    """
    whole = config.num_blocks == 1 and config.shared_spec() == config.dense_spec()
    return whole and options.method == "fitted" and not config.has_slices


def needs_text(config: MoLConfig, options: UpcycleConfig) -> bool:
    """Return whether the conversion reads text, to fit blocks or to choose layers."""
    if "skipped" in config.layer_structures and options.skipped_layers == "auto":
        return True
    if not config.converted_layers or is_copy(config, options):
        return False
    choice = options.gated_deltanet == "auto" and config.num_routed_blocks > 0
    return choice or options.method in ("fitted", "pca")


def _layer_choices(options: UpcycleConfig, layers: int, parent: BlockShape) -> dict[str, list[str]]:
    """Return layer_structures and layer_mixers."""
    converted = set(range(layers))
    if options.layers in ("middle", "auto"):
        converted = set(_middle_layers(layers, options.layers_budget))
    elif not isinstance(options.layers, str):
        converted = set(options.layers)
        refuse_beyond("upcycle.layers", options.layers, layers)
    if not isinstance(options.gated_deltanet, str):
        refuse_beyond("upcycle.gated_deltanet", options.gated_deltanet, layers)
    deltanet = chosen_layers(options.gated_deltanet, sorted(converted))
    skipped = _skipped_layers(options, sorted(converted), layers, parent)
    kind = "sliced" if options.has_slices else "mixture"
    structures = [kind if i in converted else "dense" for i in range(layers)]
    return {
        "layer_structures": ["skipped" if i in skipped else s for i, s in enumerate(structures)],
        "layer_mixers": ["gated_deltanet" if i in deltanet else "attention" for i in range(layers)],
    }


def _skipped_layers(
    options: UpcycleConfig, converted: list[int], layers: int, parent: BlockShape
) -> set[int]:
    """Return the layers to leave out; where they are chosen later, as many in the middle."""
    if options.skipped_layers == "none":
        return set()
    if isinstance(options.skipped_layers, str):
        if not options.has_slices:
            return set()
        fraction, count = _sliced_fraction(options), len(converted)
        few = round(SKIPPED_FRACTION * (1 - fraction) * count)
        # The other layers must have room for all heads and for some neurons.
        least = replace(parent, d_ff=round(FEWEST_NEURONS * parent.d_ff)).num_weights
        few = max(few, ceil(count * (1 - fraction * parent.num_weights / least)))
        few = max(0, min(few, count - 1))
        first = (len(converted) - few + 1) // 2
        return set(converted[first : first + few])
    refuse_beyond("upcycle.skipped_layers", options.skipped_layers, layers)
    if rest := sorted(set(options.skipped_layers) - set(converted)):
        raise MolError(
            f"`upcycle.skipped_layers` names layer {rest[0]}, which `upcycle.layers` keeps",
            allowed=f"layers of {converted}",
        )
    if len(options.skipped_layers) == len(converted):
        raise MolError(
            f"`upcycle.skipped_layers` names all {len(converted)} layers of `upcycle.layers`",
            allowed="at least one layer that is converted",
        )
    return set(options.skipped_layers)


def _sliced_fraction(options: UpcycleConfig) -> float:
    """The fraction of the parent layers' weights that run on a token."""
    return SLICED_FRACTION[options.preset] if options.active is None else options.active


def _slices(
    options: UpcycleConfig, parent: BlockShape, structures: list[str]
) -> tuple[BlockShape, UpcycleConfig]:
    """Return the shape of a routed slice, and the options with that of the shared slice."""
    sliced = max(1, structures.count("sliced"))
    fraction = _sliced_fraction(options) * (1 + structures.count("skipped") / sliced)
    routed = options.num_blocks > options.num_shared_blocks
    shared, own = slice_neurons(fraction, routed, parent)
    shared = options.d_ff_thin_shared or shared
    own = options.d_ff_thin or own
    if min(shared, own if routed else 1) < 1 or shared + own * routed > parent.d_ff:
        raise MolError(
            f"slices of {shared} shared and {own} routed neurons do not fit a layer of "
            f"{parent.d_ff}, with {_sliced_fraction(options):.1%} of its weights active",
            allowed=f"at least 1 of each, and {parent.d_ff} together, beside all of the parent's "
            "heads",
            hint="--set upcycle.active=0.75",
        )
    options = replace(
        options,
        d_thin_shared=parent.width,
        d_ff_thin_shared=shared,
        num_heads_shared=parent.num_heads,
    )
    return BlockShape(
        parent.width, parent.num_heads, parent.num_kv_heads, parent.head_dim, own
    ), options


def _middle_layers(count: int, fraction: float) -> range:
    """round(fraction * count) adjacent layers in the middle: in SmolLM2-135M also the cheapest."""
    few = round(fraction * count)
    first = (count - few + 1) // 2
    return range(first, first + few)


def _routed_shape(options: UpcycleConfig, parent: BlockShape, active: int) -> BlockShape:
    """The shape that the options set; where they are null, the preset's."""
    _check_heads_and_widths(options, parent, active)
    num_heads = options.num_heads_thin
    if options.preset in ("balanced", "paper"):
        width = _paper_width(parent, active) if options.d_thin is None else options.d_thin
        found = _scaled_shape(width, parent)
    else:
        fraction = ACTIVE_FRACTION[options.preset]
        found = thin_shape(fraction, active, parent, options.d_thin, num_heads)
        if found.d_ff <= 0 and options.d_ff_thin is None:
            width = thin_shape(fraction, active, parent, None, num_heads).width
            raise MolError(
                f"`upcycle.d_thin` is {found.width}, which leaves no room for neurons within "
                f"`upcycle.preset` {options.preset}, {fraction:.1%} of the parent's active weights",
                allowed="a smaller upcycle.d_thin, or upcycle.d_ff_thin beside it",
                hint=f"--set upcycle.d_thin={width}",
            )
    return make_shape(
        found.width,
        found.num_heads if num_heads is None else num_heads,
        found.d_ff if options.d_ff_thin is None else options.d_ff_thin,
        parent,
    )


def _scaled_shape(width: int, parent: BlockShape) -> BlockShape:
    """Heads and neurons in proportion to the width; more heads where that costs fewer weights."""
    scale = width / parent.width
    num_heads = cheapest_heads(max(1, round(parent.num_heads * scale)), parent)
    return make_shape(width, num_heads, max(1, round(parent.d_ff * scale)), parent)


def _paper_width(parent: BlockShape, active: int) -> int:
    """The multiple of head_dim nearest to d_model / active (arXiv 2605.09516)."""
    head_dim = parent.head_dim
    multiple = min(round(parent.width / active / head_dim), parent.width // head_dim)
    return max(1, multiple) * head_dim


def _check_heads_and_widths(options: UpcycleConfig, parent: BlockShape, active: int) -> None:
    """Raise MolError for options that no block of this parent can have."""
    for key in ("d_thin", "d_thin_shared"):
        if (width := getattr(options, key)) is not None:
            _check_width(key, width, parent, active)
    for key in ("num_heads_thin", "num_heads_shared"):
        num_heads = getattr(options, key)
        if num_heads is not None and num_heads > parent.num_heads:
            raise MolError(
                f"`upcycle.{key}` is {num_heads}, but the parent has {parent.num_heads} heads",
                allowed=f"1 to {parent.num_heads}",
                hint=f"--set upcycle.{key}={covering_heads(active, parent)}",
            )


def _check_width(key: str, width: int, parent: BlockShape, active: int) -> None:
    d_model, head_dim = parent.width, parent.head_dim
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
