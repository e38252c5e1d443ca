"""The shapes of blocks, dense and thin, from the numbers of a MoLConfig."""

from dataclasses import dataclass
from typing import Protocol


class ShapeConfig(Protocol):
    """The fields of a MoLConfig that decide the shapes of its blocks."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
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


@dataclass(frozen=True)
class BlockShape:
    """The shape of one Transformer block, dense or thin, with softmax attention.

    Attributes:
        width: of its residual: d_model in a dense layer, d_thin in a thin block.
        num_heads, num_kv_heads: query heads, and key-value heads.
        head_dim: width of a head.
        d_ff: neurons of the feed-forward network.
    """

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int

    @property
    def num_weights(self) -> int:
        """Weights of attention and gated FFN, without norms and biases."""
        attention = 2 * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.width * (attention + 3 * self.d_ff)

    def num_thin_weights(self, d_model: int) -> int:
        """`num_weights`, and those of thin_in and thin_out in a model of this width."""
        return self.num_weights + 2 * d_model * self.width


def dense_shape(config: ShapeConfig) -> BlockShape:
    """Return the shape of a dense layer's one block."""
    return BlockShape(
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        d_ff=config.intermediate_size,
    )


def routed_shape(config: ShapeConfig) -> BlockShape:
    """Return the shape of a routed block with softmax attention."""
    return BlockShape(
        width=config.d_thin,
        num_heads=config.num_heads_thin,
        num_kv_heads=config.num_kv_heads_thin,
        head_dim=config.head_dim,
        d_ff=config.d_ff_thin,
    )


def shared_shape(config: ShapeConfig) -> BlockShape:
    """Return the shape of a shared block. Numbers that are None are those of a routed block."""

    def own(number: int | None, routed: int) -> int:
        return routed if number is None else number

    return BlockShape(
        width=own(config.d_thin_shared, config.d_thin),
        num_heads=own(config.num_heads_shared, config.num_heads_thin),
        num_kv_heads=own(config.num_kv_heads_shared, config.num_kv_heads_thin),
        head_dim=config.head_dim,
        d_ff=own(config.d_ff_thin_shared, config.d_ff_thin),
    )
