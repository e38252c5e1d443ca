"""Names and shapes of each family's tensors, and why other parents are refused."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NoReturn

from transformers import PreTrainedConfig

from molcli.errors import MolError

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

# our name in a layer -> (the checkpoint's name in a layer, its shape in the letters of `_sizes`)
_BLOCK = {
    "block.input_norm": ("input_layernorm.weight", "d"),
    "block.post_norm": ("post_attention_layernorm.weight", "d"),
    "block.mixer.q_proj": ("self_attn.q_proj.weight", "qd"),
    "block.mixer.k_proj": ("self_attn.k_proj.weight", "kd"),
    "block.mixer.v_proj": ("self_attn.v_proj.weight", "kd"),
    "block.mixer.o_proj": ("self_attn.o_proj.weight", "dq"),
    "block.mlp.gate_proj": ("mlp.gate_proj.weight", "fd"),
    "block.mlp.up_proj": ("mlp.up_proj.weight", "fd"),
    "block.mlp.down_proj": ("mlp.down_proj.weight", "df"),
}
_QKV_BIAS = {
    "block.mixer.q_bias": ("self_attn.q_proj.bias", "q"),
    "block.mixer.k_bias": ("self_attn.k_proj.bias", "k"),
    "block.mixer.v_bias": ("self_attn.v_proj.bias", "k"),
}
_OUT_BIAS = {"block.mixer.o_bias": ("self_attn.o_proj.bias", "d")}
_QK_NORM = {
    "block.mixer.q_norm": ("self_attn.q_norm.weight", "h"),
    "block.mixer.k_norm": ("self_attn.k_norm.weight", "h"),
}
# our name in a layer -> (the checkpoint's name, the heights that it stacks, which of them is ours)
_FUSED = {
    "block.mixer.q_proj": ("self_attn.qkv_proj.weight", "qkk", 0),
    "block.mixer.k_proj": ("self_attn.qkv_proj.weight", "qkk", 1),
    "block.mixer.v_proj": ("self_attn.qkv_proj.weight", "qkk", 2),
    "block.mlp.gate_proj": ("mlp.gate_up_proj.weight", "ff", 0),
    "block.mlp.up_proj": ("mlp.gate_up_proj.weight", "ff", 1),
}
# Buffers that old Llama checkpoints saved; the rotary frequencies follow from the config.
_RECOMPUTED = "self_attn.rotary_emb.inv_freq"


@dataclass(frozen=True)
class Source:
    """Where one tensor of a layer lives: its full name in the checkpoint and its shape there.

    rows: the part of it that is meant, where it stacks several; None for all.
    """

    name: str
    shape: tuple[int, ...]
    rows: slice | None = None


@dataclass(frozen=True)
class Family:
    """What distinguishes a family's decoder layer from Llama's.

    qkv_bias, out_bias: whether the projections carry a bias; None leaves it to the config's
    `attention_bias`. qk_norm: RMS norm of each query and key head. windows: which layers a
    configured sliding window applies to; "marked" are those that `layer_types` lists as sliding.
    fused: queries, keys and values are one matrix, and so are the FFN's gate and up.
    """

    model_type: str
    qkv_bias: bool | None
    out_bias: bool | None
    qk_norm: bool
    windows: Literal["none", "all", "marked"]
    fused: bool = False

    def has_qkv_bias(self, config: PreTrainedConfig) -> bool:
        """Whether queries, keys and values have biases under this config."""
        return bool(config.attention_bias) if self.qkv_bias is None else self.qkv_bias

    def has_out_bias(self, config: PreTrainedConfig) -> bool:
        """Whether attention's output projection has a bias under this config."""
        return bool(config.attention_bias) if self.out_bias is None else self.out_bias

    def layer(self, config: PreTrainedConfig, index: int) -> dict[str, Source]:
        """Our names, relative to `model.layers.{index}.`, with their source."""
        table = dict(_BLOCK)
        if self.has_qkv_bias(config):
            table |= _QKV_BIAS
        if self.has_out_bias(config):
            table |= _OUT_BIAS
        if self.qk_norm:
            table |= _QK_NORM
        sizes, prefix = _sizes(config), f"model.layers.{index}."
        sources = {
            ours: Source(prefix + theirs, tuple(sizes[c] for c in letters))
            for ours, (theirs, letters) in table.items()
        }
        if self.fused:
            for ours, (theirs, letters, place) in _FUSED.items():
                ends = list(accumulate(sizes[c] for c in letters))
                rows = slice(ends[place] - sizes[letters[place]], ends[place])
                sources[ours] = Source(prefix + theirs, (ends[-1], sizes["d"]), rows)
        return sources

    def expected(self, config: PreTrainedConfig, *, tied: bool) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must hold, with its shape."""
        vocabulary = (config.vocab_size, config.hidden_size)
        tensors = {EMBEDDING: vocabulary, FINAL_NORM: (config.hidden_size,)}
        if not tied:
            tensors[LM_HEAD] = vocabulary
        for index in range(config.num_hidden_layers):
            tensors |= {s.name: s.shape for s in self.layer(config, index).values()}
        return tensors

    def redundant(self, config: PreTrainedConfig, *, tied: bool) -> set[str]:
        """Tensors that a checkpoint may hold although nothing reads them."""
        names = {f"model.layers.{i}.{_RECOMPUTED}" for i in range(config.num_hidden_layers)}
        return names | {LM_HEAD} if tied else names

    def sliding_window(self, config: PreTrainedConfig) -> int | None:
        """Tokens that a query of some layer sees, itself included; None if all of them."""
        marked = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        if self.windows == "none" or (self.windows == "marked" and not marked):
            return None
        window: int | None = config.sliding_window
        return window


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", qkv_bias=None, out_bias=None, qk_norm=False, windows="none"),
        Family("mistral", qkv_bias=False, out_bias=False, qk_norm=False, windows="all"),
        Family("qwen2", qkv_bias=True, out_bias=False, qk_norm=False, windows="marked"),
        Family("qwen3", qkv_bias=None, out_bias=None, qk_norm=True, windows="marked"),
        Family("phi3", qkv_bias=False, out_bias=False, qk_norm=False, windows="all", fused=True),
    )
}


def head_dim(config: PreTrainedConfig) -> int:
    """Width of an attention head; configs older than the field imply it."""
    width: int | None = getattr(config, "head_dim", None)
    if width is not None:
        return width
    return int(config.hidden_size // config.num_attention_heads)


def _sizes(config: PreTrainedConfig) -> dict[str, int]:
    width = head_dim(config)
    return {
        "d": config.hidden_size,
        "q": config.num_attention_heads * width,
        "k": config.num_key_value_heads * width,
        "h": width,
        "f": config.intermediate_size,
    }


_EXPERTS = "is a mixture of experts, not one dense FFN a layer"
# model type -> what MoL blocks lack for it. A block normalises what attention and FFN read by
# RMSNorm, turns queries and keys by rotary positions, and has a gated FFN; nothing else.
_LACKING = {
    "gpt2": "has LayerNorms with biases, learned positions, and an FFN without a gate",
    "gpt_neox": "has LayerNorms with biases, and attention and FFN side by side",
    "phi": "has LayerNorms with biases, and attention and FFN side by side",
    "gemma": "has norms that multiply by 1 + weight, and embeddings scaled by sqrt(hidden_size)",
    "gemma2": "has norms behind attention and FFN besides those before, and soft caps on "
    "attention scores and logits",
    "gemma3": "has norms behind attention and FFN besides those before, and another rotary base "
    "in sliding-window layers",
    "olmo": "has LayerNorms without weights",
    "olmo2": "has norms behind attention and FFN in place of those before, and normalises queries "
    "and keys over all heads together",
    "mixtral": _EXPERTS,
    "olmoe": _EXPERTS,
    "phimoe": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
}
_LACKING |= {"gemma3_text": _LACKING["gemma3"], "olmo3": _LACKING["olmo2"]}


def refuse_family(model: object, model_type: object, families: Iterable[str]) -> NoReturn:
    """Raises MolError with the reason where the type is known. model: as the user should see it."""
    reason = _LACKING.get(str(model_type))
    raise MolError(
        f"{model} is a model of type {model_type!r}" + (f", which {reason}" if reason else ""),
        allowed=f"dense decoders of type {', '.join(families)}",
        hint="choose a parent of one of these families",
    )


def refuse_variant(config: PreTrainedConfig) -> None:
    """Raises MolError for variants of a supported family that MoL blocks cannot express."""
    if getattr(config, "mlp_bias", False):
        raise MolError(
            "the parent's config.json has mlp_bias: true, and MoL's FFN carries no bias",
            allowed="mlp_bias: false",
            hint="choose a parent without FFN biases, such as any Llama released by Meta",
        )
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if share != 1.0 and config.model_type != "phi3":
        raise MolError(
            f"the parent's config.json has partial_rotary_factor: {share}, which transformers "
            f"heeds in some {config.model_type} models only",
            allowed="partial_rotary_factor: 1.0, but for phi3",
            hint="remove the key if the model was trained without it",
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        raise MolError(
            f"the parent's weights are quantized ({_quant_method(quantization)})",
            allowed="weights stored as bfloat16, float16 or float32",
            hint="use the original checkpoint that the quantized one was made from",
        )


def _quant_method(quantization: object) -> str:
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "unnamed method"))
    return type(quantization).__name__
