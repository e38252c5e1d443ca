"""The numbers of a MoLConfig that decide its size, and the shapes of thin blocks in them."""

from dataclasses import dataclass
from typing import Protocol


class Architecture(Protocol):
    """The fields of a MoLConfig that decide how many parameters there are."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    mlp_gated: bool
    attention_bias: bool
    attention_out_bias: bool
    qk_norm: bool
    qk_norm_full_width: bool
    pre_norms: bool
    output_norms: bool
    output_norms_thin: bool
    tie_word_embeddings: bool
    layer_structures: list[str]
    layer_mixers: list[str]
    num_blocks: int
    num_shared_blocks: int
    num_blocks_per_tok: int
    d_thin: int
    d_ff_thin: int
    num_heads_thin: int
    num_kv_heads_thin: int
    d_thin_shared: int | None
    d_ff_thin_shared: int | None
    num_heads_shared: int | None
    num_kv_heads_shared: int | None
    restrict_attention: bool


@dataclass(frozen=True)
class BlockShape:
    """Of a thin block: its width, FFN neurons, query and key-value heads."""

    width: int
    d_ff: int
    num_heads: int
    num_kv_heads: int


def routed_shape(config: Architecture) -> BlockShape:
    """Of a routed block with softmax attention."""
    return BlockShape(
        width=config.d_thin,
        d_ff=config.d_ff_thin,
        num_heads=config.num_heads_thin,
        num_kv_heads=config.num_kv_heads_thin,
    )


def shared_shape(config: Architecture) -> BlockShape:
    """Of a shared block: where its numbers are None, they are the routed blocks'."""

    def own(number: int | None, routed: int) -> int:
        return routed if number is None else number

    return BlockShape(
        width=own(config.d_thin_shared, config.d_thin),
        d_ff=own(config.d_ff_thin_shared, config.d_ff_thin),
        num_heads=own(config.num_heads_shared, config.num_heads_thin),
        num_kv_heads=own(config.num_kv_heads_shared, config.num_kv_heads_thin),
    )
