"""From a recipe and a parent to the shape of the converted model."""

from typing import Any

from molcli.config.layer_choice import chosen_layers, refuse_beyond
from molcli.config.sections import UpcycleConfig
from molcli.errors import MolError
from molcli.io.parent import Parent
from molcli.maths.partition import Part, partition, thin_kv_heads
from molcli.model.configuration_mol import MoLConfig


def mol_config(parent: Parent, config: UpcycleConfig) -> MoLConfig:
    """The converted model's configuration, nulls resolved.

    Layers that `gated_deltanet: auto` will decide count as softmax. Raises MolError where the
    recipe does not fit the parent.
    """
    dense = parent.mol_config_kwargs()
    d_model, head_dim, layers = dense["hidden_size"], dense["head_dim"], dense["num_hidden_layers"]
    routed = config.num_blocks - config.num_shared_blocks
    top_k = min(2, routed) if config.top_k is None else config.top_k
    d_thin = _d_thin(config, d_model, head_dim, config.num_shared_blocks + top_k)
    share = d_thin / d_model
    heads = max(1, round(dense["num_attention_heads"] * share))
    kv_heads = thin_kv_heads(heads, dense["num_attention_heads"], dense["num_key_value_heads"])
    d_ff = max(1, round(dense["intermediate_size"] * share))
    converted = set(range(layers))
    if not isinstance(config.layers, str):
        converted = set(config.layers)
        refuse_beyond("upcycle.layers", config.layers, layers)
    if not isinstance(config.gated_deltanet, str):
        refuse_beyond("upcycle.gated_deltanet", config.gated_deltanet, layers)
    deltanet = chosen_layers(config.gated_deltanet, sorted(converted))
    kinds = [_kind(i in converted, i in deltanet) for i in range(layers)]
    thin: dict[str, Any] = {
        "layer_kinds": kinds,
        "num_blocks": config.num_blocks,
        "num_shared_blocks": config.num_shared_blocks,
        "num_blocks_per_tok": top_k,
        "d_thin": d_thin,
        "d_ff_thin": d_ff if config.d_ff_thin is None else config.d_ff_thin,
        "thin_num_attention_heads": heads,
        "thin_num_key_value_heads": kv_heads,
    }
    return MoLConfig(**(dense | thin))


def parts(config: MoLConfig) -> list[Part]:
    """The shares of a dense layer: one per shared block, then one per routed family."""
    return partition(
        config.num_shared_blocks + config.num_blocks_per_tok,
        heads=config.thin_num_attention_heads,
        d_ff=config.d_ff_thin,
        parent_heads=config.num_attention_heads,
        parent_kv_heads=config.num_key_value_heads,
        parent_d_ff=config.intermediate_size,
    )


def is_whole(config: MoLConfig) -> bool:
    """Whether the one block is the parent's layer: full width, all heads and neurons."""
    thin = config.d_thin, config.d_ff_thin, config.thin_num_attention_heads
    dense = config.hidden_size, config.intermediate_size, config.num_attention_heads
    return config.num_blocks == config.num_shared_blocks == 1 and thin == dense


def is_copy(config: MoLConfig, options: UpcycleConfig) -> bool:
    """Whether the conversion copies the parent's layers as they are, and needs no text."""
    return is_whole(config) and options.method == "fitted"


def _d_thin(config: UpcycleConfig, d_model: int, head_dim: int, active: int) -> int:
    if config.d_thin is None:
        heads = min(round(d_model / active / head_dim), d_model // head_dim)
        return max(1, heads) * head_dim
    if config.d_thin > d_model:
        raise MolError(
            f"`upcycle.d_thin` is {config.d_thin}, but the model's width is {d_model}",
            allowed=f"multiples of head_dim, {head_dim}, up to {d_model}",
            hint=f"--set upcycle.d_thin={max(head_dim, d_model // active // head_dim * head_dim)}",
        )
    if config.d_thin % head_dim:
        below = max(1, config.d_thin // head_dim) * head_dim
        raise MolError(
            f"`upcycle.d_thin` is {config.d_thin}, but a head is {head_dim} wide",
            allowed=f"multiples of head_dim, {head_dim}, up to {d_model}",
            hint=f"--set upcycle.d_thin={below}",
        )
    return config.d_thin


def _kind(converted: bool, deltanet: bool) -> str:
    if not converted:
        return "dense"
    return "gated_deltanet" if deltanet else "softmax"
