"""Configuration of a Mixture of Layers language model (arXiv 2605.09516)."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from molcli.model.shapes import BlockShape, routed_shape, shared_shape

# The mixer of a dense layer's one block, by the layer's kind.
DENSE_KINDS = {"dense": "softmax", "dense_gated_deltanet": "gated_deltanet"}
LAYER_KINDS = (*DENSE_KINDS, "softmax", "gated_deltanet")


@dataclass(frozen=True)
class BlockSpec:
    """The shape of a stack of blocks that share one shape.

    num_blocks: blocks in the stack. width: their residual width. mixer: "softmax" or
    "gated_deltanet". d_ff: FFN neurons. Heads are head_dim wide at every width. output_norms: of
    what attention and FFN add. window: latest tokens that attention sees, None for all.
    local_rotary: whether its rotary base is that of layers with a window.
    """

    num_blocks: int
    width: int
    mixer: str
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    output_norms: bool = False
    window: int | None = None
    local_rotary: bool = False


class MoLConfig(PreTrainedConfig):
    """A stack of dense and Mixture of Layers (MoL) layers.

    layer_kinds: one of "dense", "dense_gated_deltanet", "softmax", "gated_deltanet" per layer. The
        first two are ordinary pre-norm Transformer layers, with softmax attention or Gated DeltaNet
        at full width; the others are MoL layers, named after the mixer of their routed blocks
        (shared blocks always use softmax attention).
    num_blocks, num_shared_blocks, num_blocks_per_tok: N thin blocks, S of them on every token, K of
        the other N - S on each token.
    d_thin, d_ff_thin, num_heads_thin, num_kv_heads_thin: shape of a thin block.
    d_thin_shared, d_ff_thin_shared, num_heads_shared, num_kv_heads_shared: shape
        of a shared block; None is as in a routed one.
    restrict_attention: false runs every routed block on every token and uses the K outputs.
    router_aux_loss_coef: weight of the CV^2 balance loss where router logits are asked for.
    intermediate_size, num_attention_heads, num_key_value_heads: shape of dense layers.
    qk_norm, qk_norm_full_width: whether queries and keys pass an RMSNorm, and whether that is one
        over all heads of a block, not one over each head.
    pre_norms: whether attention and FFN read the residual through an RMSNorm.
    output_norms, output_norms_thin: whether what attention and FFN add passes an RMSNorm, in dense
        layers and in thin blocks.
    embedding_scale: factor of the embeddings, which the output head does not have.
    sliding_windows: per layer, how many of the latest tokens, itself included, a token's softmax
        attention sees; None for all of them.
    rope_theta_local: rotary base of layers with a sliding window; None for the others' base.
    Raises ValueError when the numbers contradict each other.
    """

    model_type = "mol"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "router_logits", "routing"]

    def __init__(
        self,
        vocab_size: int = 32_000,
        hidden_size: int = 1024,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int = 64,
        intermediate_size: int = 4096,
        hidden_act: str = "silu",
        mlp_gated: bool = True,
        attention_bias: bool = False,
        attention_out_bias: bool = False,
        qk_norm: bool = False,
        qk_norm_full_width: bool = False,
        pre_norms: bool = True,
        output_norms: bool = False,
        output_norms_thin: bool = False,
        rms_norm_eps: float = 1e-6,
        rope_parameters: dict[str, Any] | None = None,
        rope_theta_local: float | None = None,
        sliding_windows: list[int | None] | None = None,
        embedding_scale: float = 1.0,
        max_position_embeddings: int = 4096,
        initializer_range: float = 0.02,
        layer_kinds: list[str] | None = None,
        num_blocks: int = 15,
        num_shared_blocks: int = 1,
        num_blocks_per_tok: int = 3,
        d_thin: int = 256,
        d_ff_thin: int = 1024,
        num_heads_thin: int | None = None,
        num_kv_heads_thin: int | None = None,
        d_thin_shared: int | None = None,
        d_ff_thin_shared: int | None = None,
        num_heads_shared: int | None = None,
        num_kv_heads_shared: int | None = None,
        restrict_attention: bool = True,
        router_aux_loss_coef: float = 0.05,
        output_router_logits: bool = False,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.mlp_gated = mlp_gated
        self.attention_bias = attention_bias
        self.attention_out_bias = attention_out_bias
        self.qk_norm = qk_norm
        self.qk_norm_full_width = qk_norm_full_width
        self.pre_norms = pre_norms
        self.output_norms = output_norms
        self.output_norms_thin = output_norms_thin
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10_000.0}
        self.rope_theta_local = rope_theta_local
        self.sliding_windows = sliding_windows
        self.embedding_scale = embedding_scale
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.layer_kinds = layer_kinds or ["gated_deltanet"] * num_hidden_layers
        self.num_blocks = num_blocks
        self.num_shared_blocks = num_shared_blocks
        self.num_blocks_per_tok = num_blocks_per_tok
        self.d_thin = d_thin
        self.d_ff_thin = d_ff_thin
        self.num_heads_thin = num_heads_thin or d_thin // head_dim
        self.num_kv_heads_thin = num_kv_heads_thin or self.num_heads_thin
        self.d_thin_shared = d_thin_shared
        self.d_ff_thin_shared = d_ff_thin_shared
        self.num_heads_shared = num_heads_shared
        self.num_kv_heads_shared = num_kv_heads_shared
        self.restrict_attention = restrict_attention
        self.router_aux_loss_coef = router_aux_loss_coef
        self.output_router_logits = output_router_logits
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self._check()
        super().__init__(**kwargs)

    @property
    def num_routed_blocks(self) -> int:
        return self.num_blocks - self.num_shared_blocks

    @property
    def num_experts(self) -> int:
        """`num_routed_blocks`, by the name that transformers' and trl's balance losses read."""
        return self.num_routed_blocks

    @property
    def num_experts_per_tok(self) -> int:
        """`num_blocks_per_tok`, by the name that transformers' and trl's balance losses read."""
        return self.num_blocks_per_tok

    def is_dense(self, layer: int) -> bool:
        """Whether layer `layer` is one full-width block."""
        return self.layer_kinds[layer] in DENSE_KINDS

    def dense_spec(self, kind: str = "dense", layer: int = 0) -> BlockSpec:
        """The one full-width block of a dense layer of this kind, in place of layer `layer`."""
        heads, mixer = self.num_attention_heads, DENSE_KINDS[kind]
        return BlockSpec(
            num_blocks=1,
            width=self.hidden_size,
            mixer=mixer,
            d_ff=self.intermediate_size,
            num_heads=heads,
            num_kv_heads=self.num_key_value_heads if mixer == "softmax" else heads,
            head_dim=self.head_dim,
            output_norms=self.output_norms,
            **self._attention_range(layer),
        )

    def shared_spec(self, layer: int = 0) -> BlockSpec:
        """The shared thin blocks of MoL layer `layer`."""
        return self._thin_spec(shared_shape(self), self.num_shared_blocks, "softmax", layer)

    def routed_spec(self, layer: int) -> BlockSpec:
        """The routed thin blocks of MoL layer `layer`."""
        kind = self.layer_kinds[layer]
        return self._thin_spec(routed_shape(self), self.num_routed_blocks, kind, layer)

    def _thin_spec(self, shape: BlockShape, num_blocks: int, mixer: str, layer: int) -> BlockSpec:
        return BlockSpec(
            num_blocks=num_blocks,
            width=shape.width,
            mixer=mixer,
            d_ff=shape.d_ff,
            num_heads=shape.num_heads,
            # A linear-attention state belongs to one head: keys and values are not shared.
            num_kv_heads=shape.num_kv_heads if mixer == "softmax" else shape.num_heads,
            head_dim=self.head_dim,
            output_norms=self.output_norms_thin,
            **self._attention_range(layer),
        )

    def _attention_range(self, layer: int) -> dict[str, Any]:
        window = None if self.sliding_windows is None else self.sliding_windows[layer]
        local = window is not None and self.rope_theta_local is not None
        return {"window": window, "local_rotary": local}

    def _check(self) -> None:
        unknown = sorted(set(self.layer_kinds) - set(LAYER_KINDS))
        if unknown:
            raise ValueError(f"layer_kinds has {unknown}; known are {', '.join(LAYER_KINDS)}")
        if len(self.layer_kinds) != self.num_hidden_layers:
            raise ValueError(
                f"layer_kinds names {len(self.layer_kinds)} layers, "
                f"num_hidden_layers is {self.num_hidden_layers}"
            )
        if self.sliding_windows and len(self.sliding_windows) != self.num_hidden_layers:
            raise ValueError(
                f"sliding_windows names {len(self.sliding_windows)} layers, "
                f"num_hidden_layers is {self.num_hidden_layers}"
            )
        if not 0 <= self.num_shared_blocks <= self.num_blocks:
            raise ValueError(
                f"num_shared_blocks is {self.num_shared_blocks} of num_blocks {self.num_blocks}"
            )
        if not min(1, self.num_routed_blocks) <= self.num_blocks_per_tok <= self.num_routed_blocks:
            raise ValueError(
                f"num_blocks_per_tok is {self.num_blocks_per_tok} "
                f"of {self.num_routed_blocks} routed blocks"
            )
        thin = routed_shape(self), shared_shape(self)
        for heads, kv_heads in (
            (self.num_attention_heads, self.num_key_value_heads),
            *((shape.num_heads, shape.num_kv_heads) for shape in thin),
        ):
            if heads < 1 or heads % kv_heads:
                raise ValueError(f"{heads} query heads cannot share {kv_heads} key-value heads")
