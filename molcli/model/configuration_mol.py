"""Configuration of a Mixture of Layers language model (arXiv 2605.09516)."""

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from molcli.families.positions import declared_limit
from molcli.model.mixers import MIXERS
from molcli.model.shapes import BlockShape, dense_shape, routed_shape, shared_shape

STRUCTURES = ("dense", "mixture", "sliced", "skipped")
# Structure and mixer of a layer, by the one name that configurations had for both up to 0.1.
_LAYER_KINDS = {
    "dense": ("dense", "attention"),
    "dense_gated_deltanet": ("dense", "gated_deltanet"),
    "softmax": ("mixture", "attention"),
    "gated_deltanet": ("mixture", "gated_deltanet"),
}
# Fields by the names that they had up to 0.1.
RENAMED = {
    "thin_num_attention_heads": "num_heads_thin",
    "thin_num_key_value_heads": "num_kv_heads_thin",
    "shared_num_attention_heads": "num_heads_shared",
    "shared_num_key_value_heads": "num_kv_heads_shared",
}


@dataclass(frozen=True)
class BlockSpec:
    """The shape of a stack of blocks that share one shape.

    Attributes:
        num_blocks: blocks in the stack.
        width: width of their residual.
        mixer: name of their mixer, a key of `molcli.model.mixers.MIXERS`.
        d_ff: neurons of the feed-forward network.
        num_heads, num_kv_heads: query heads, and key-value heads.
        head_dim: width of a head, the same at every width of a block.
        output_norms: whether what mixer and feed-forward network add passes an RMSNorm.
        window: how many of the latest tokens attention sees; None for all of them.
        local_rotary: whether the rotary base is that of layers with a window.
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

    Args:
        layer_structures: for each layer one of four names. "dense": an ordinary pre-norm
            Transformer layer. "mixture": shared and routed thin blocks. "sliced": a layer at full
            width, whose mixer and some of whose neurons run on every token (the shared slice),
            and routed slices of further neurons. "skipped": nothing, the residual passes.
        layer_mixers: for each layer the mixer of its block at full width, or of a mixture's routed
            blocks: "attention" or "gated_deltanet". Shared thin blocks always have attention.
        num_blocks, num_shared_blocks, num_blocks_per_tok: N thin blocks, S of them on every token,
            K of the other N - S on each token.
        d_thin, d_ff_thin, num_heads_thin, num_kv_heads_thin: shape of a routed block.
        d_thin_shared, d_ff_thin_shared, num_heads_shared, num_kv_heads_shared: shape of a shared
            block; None is as in a routed one. In a sliced layer, the blocks are slices at full
            width: of the shared one, d_ff_thin_shared neurons and num_heads_shared heads; of each
            routed one, d_ff_thin neurons and no heads.
        restrict_attention: False runs every routed block on every token and uses the K outputs.
        router_aux_loss_coef: weight of the CV^2 balance loss where router logits are asked for.
        intermediate_size, num_attention_heads, num_key_value_heads: shape of dense layers.
        qk_norm, qk_norm_full_width: whether queries and keys pass an RMSNorm, and whether that is
            one over all heads of a block instead of one over each head.
        pre_norms: whether attention and FFN read the residual through an RMSNorm.
        output_norms, output_norms_thin: whether what attention and FFN add passes an RMSNorm, in
            dense layers and in thin blocks.
        embedding_scale: factor of the embeddings, which the output head does not have.
        sliding_windows: for each layer, how many of the latest tokens, itself included, a token's
            attention sees; None for all of them.
        rope_theta_local: rotary base of layers with a sliding window; None for the others' base.

    Names that earlier configurations had are accepted: `layer_kinds`, `thin_num_attention_heads`
    and the like.

    Raises:
        ValueError: when the numbers contradict each other.
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
        layer_structures: list[str] | None = None,
        layer_mixers: list[str] | None = None,
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
        if (kinds := kwargs.pop("layer_kinds", None)) is not None:
            unknown = sorted(set(kinds) - set(_LAYER_KINDS))
            if unknown:
                raise ValueError(f"layer_kinds has {unknown}; known are {', '.join(_LAYER_KINDS)}")
            layer_structures = [_LAYER_KINDS[kind][0] for kind in kinds]
            layer_mixers = [_LAYER_KINDS[kind][1] for kind in kinds]
        old = {new: kwargs.pop(name) for name, new in RENAMED.items() if name in kwargs}
        num_heads_thin = old.get("num_heads_thin", num_heads_thin)
        num_kv_heads_thin = old.get("num_kv_heads_thin", num_kv_heads_thin)
        num_heads_shared = old.get("num_heads_shared", num_heads_shared)
        num_kv_heads_shared = old.get("num_kv_heads_shared", num_kv_heads_shared)
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
        self.layer_structures = layer_structures or ["mixture"] * num_hidden_layers
        self.layer_mixers = layer_mixers or [
            "gated_deltanet" if structure == "mixture" else "attention"
            for structure in self.layer_structures
        ]
        self.num_blocks = num_blocks
        self.num_shared_blocks = num_shared_blocks
        self.num_blocks_per_tok = num_blocks_per_tok
        self.d_thin = d_thin
        self.d_ff_thin = d_ff_thin
        self.num_heads_thin = num_heads_thin or max(1, d_thin // head_dim)
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

    def check_context(self, length: int, setting: str, *, found: str = "") -> None:
        """Refuse a context that is longer than the model has positions.

        The arguments are those of `ContextLimit.check`. Every command that runs text through a
        model calls this.
        """
        limit = declared_limit(self.max_position_embeddings, "the model")
        limit.check(length, setting, found=found)

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
        """Return whether layer `layer` is one full-width block."""
        return self.layer_structures[layer] == "dense"

    def is_skipped(self, layer: int) -> bool:
        """Return whether layer `layer` adds nothing."""
        return self.layer_structures[layer] == "skipped"

    def is_routed(self, layer: int) -> bool:
        """Return whether layer `layer` has a router."""
        return self.layer_structures[layer] in ("mixture", "sliced") and self.num_routed_blocks > 0

    @property
    def converted_layers(self) -> list[int]:
        """The layers that are neither a parent's nor skipped: mixtures and sliced ones."""
        structures = enumerate(self.layer_structures)
        return [layer for layer, name in structures if name in ("mixture", "sliced")]

    @property
    def has_slices(self) -> bool:
        """Whether the model's blocks are slices at full width, not thin blocks."""
        return "sliced" in self.layer_structures

    @property
    def layer_labels(self) -> list[str]:
        """Structure and mixer of each layer in words, such as "mixture, attention"."""
        pairs = zip(self.layer_structures, self.layer_mixers, strict=True)
        return [f"{structure}, {mixer}" for structure, mixer in pairs]

    @property
    def is_recurrent(self) -> bool:
        """Whether the mixer of a layer carries a state of fixed size."""
        return any(MIXERS[mixer].is_recurrent for mixer in self.layer_mixers)

    def dense_spec(self, mixer: str = "attention", layer: int = 0) -> BlockSpec:
        """Return the shape of the one block of dense layer `layer`."""
        return self._spec(dense_shape(self), 1, mixer, layer, self.output_norms)

    def shared_spec(self, layer: int = 0) -> BlockSpec:
        """Return the shape of the shared blocks of mixture `layer`."""
        count, norms = self.num_shared_blocks, self.output_norms_thin
        return self._spec(shared_shape(self), count, "attention", layer, norms)

    def routed_spec(self, mixer: str, layer: int = 0) -> BlockSpec:
        """Return the shape of the routed blocks of mixture `layer`, with this mixer."""
        count, norms = self.num_routed_blocks, self.output_norms_thin
        return self._spec(routed_shape(self), count, mixer, layer, norms)

    def sliced_spec(self, mixer: str = "attention", layer: int = 0) -> BlockSpec:
        """Return the shape of the mixer and the shared slice of sliced `layer`."""
        shape = replace(shared_shape(self), width=self.hidden_size)
        return self._spec(shape, 1, mixer, layer, self.output_norms)

    def slices_spec(self, layer: int = 0) -> BlockSpec:
        """Return the shape of the routed slices of sliced `layer`: neurons without heads."""
        shape = BlockShape(self.hidden_size, 0, 0, self.head_dim, self.d_ff_thin)
        return self._spec(shape, self.num_routed_blocks, "attention", layer, False)

    def always_spec(self, layer: int) -> BlockSpec | None:
        """Return the shape of the blocks of layer `layer` that run on every token, None if it is
        skipped."""
        mixer, structure = self.layer_mixers[layer], self.layer_structures[layer]
        if structure == "mixture":
            return self.shared_spec(layer)
        if structure == "skipped":
            return None
        return (self.dense_spec if structure == "dense" else self.sliced_spec)(mixer, layer)

    def _spec(
        self, shape: BlockShape, num_blocks: int, mixer: str, layer: int, output_norms: bool
    ) -> BlockSpec:
        shares = MIXERS[mixer].shares_kv_heads
        window = None if self.sliding_windows is None else self.sliding_windows[layer]
        return BlockSpec(
            num_blocks=num_blocks,
            width=shape.width,
            mixer=mixer,
            d_ff=shape.d_ff,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads if shares else shape.num_heads,
            head_dim=shape.head_dim,
            output_norms=output_norms,
            window=window,
            local_rotary=window is not None and self.rope_theta_local is not None,
        )

    def _check(self) -> None:
        for name, known in (("layer_structures", STRUCTURES), ("layer_mixers", tuple(MIXERS))):
            given = getattr(self, name)
            if unknown := sorted(set(given) - set(known)):
                raise ValueError(f"{name} has {unknown}; known are {', '.join(known)}")
            if len(given) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} names {len(given)} layers, "
                    f"num_hidden_layers is {self.num_hidden_layers}"
                )
        windows = self.sliding_windows
        if windows is not None and len(windows) != self.num_hidden_layers:
            raise ValueError(
                f"sliding_windows names {len(windows)} layers, "
                f"num_hidden_layers is {self.num_hidden_layers}"
            )
        if any(window is not None and window < 1 for window in windows or ()):
            raise ValueError(f"sliding_windows is {windows}: a window of no tokens")
        if not 0 <= self.num_shared_blocks <= self.num_blocks:
            raise ValueError(
                f"num_shared_blocks is {self.num_shared_blocks} of num_blocks {self.num_blocks}"
            )
        if not min(1, self.num_routed_blocks) <= self.num_blocks_per_tok <= self.num_routed_blocks:
            raise ValueError(
                f"num_blocks_per_tok is {self.num_blocks_per_tok} "
                f"of {self.num_routed_blocks} routed blocks"
            )
        if self.has_slices and ("mixture" in self.layer_structures or self.num_shared_blocks != 1):
            raise ValueError(
                "a model with sliced layers has one shared block, its shared slice, and no "
                f"mixtures; num_shared_blocks is {self.num_shared_blocks}, layer_structures has "
                f"{', '.join(sorted(set(self.layer_structures)))}"
            )
        thin = routed_shape(self), shared_shape(self)
        for heads, kv_heads in (
            (self.num_attention_heads, self.num_key_value_heads),
            *((shape.num_heads, shape.num_kv_heads) for shape in thin),
        ):
            if heads < 1 or heads % kv_heads:
                raise ValueError(f"{heads} query heads cannot share {kv_heads} key-value heads")
