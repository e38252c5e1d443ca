"""What a family of dense parents says about itself: tensor names, configuration, refusals.

A new family is one file beside this one, with a subclass of `Family`, and one line in the registry
(`molcli/families/__init__.py`). The subclass states how the family differs from Llama.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig

from molcli.errors import MolError
from molcli.families import positions

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

Transform = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Stored:
    """How the checkpoint of a family stores one tensor of a layer.

    name: below `model.layers.{index}.`. shape: one letter per dimension; d is hidden_size, f
    intermediate_size, q and k the widths of all query and all key heads, h the width of one head.
    stack: the heights of the parts, as letters, where the tensor stacks several along its first
    dimension; place: which of them is meant. transform: turns what is stored into MoL's tensor.
    """

    name: str
    shape: str
    stack: str = ""
    place: int = 0
    transform: Transform | None = None


@dataclass(frozen=True)
class Source:
    """Where one tensor of a parent is read from: its full name in the checkpoint, its shape there.

    rows: the part that is meant, where the tensor stacks several; None for all. transform: turns
    the stored tensor into MoL's; None where they are equal.
    """

    name: str
    shape: tuple[int, ...]
    rows: slice | None = None
    transform: Transform | None = None


# MoL's name in a layer -> how Llama stores it.
PRE_NORMS = {
    "block.input_norm": Stored("input_layernorm.weight", "d"),
    "block.post_norm": Stored("post_attention_layernorm.weight", "d"),
}
ATTENTION = {
    "block.mixer.q_proj": Stored("self_attn.q_proj.weight", "qd"),
    "block.mixer.k_proj": Stored("self_attn.k_proj.weight", "kd"),
    "block.mixer.v_proj": Stored("self_attn.v_proj.weight", "kd"),
    "block.mixer.o_proj": Stored("self_attn.o_proj.weight", "dq"),
}
QKV_BIAS = {
    "block.mixer.q_bias": Stored("self_attn.q_proj.bias", "q"),
    "block.mixer.k_bias": Stored("self_attn.k_proj.bias", "k"),
    "block.mixer.v_bias": Stored("self_attn.v_proj.bias", "k"),
}
OUT_BIAS = {"block.mixer.o_bias": Stored("self_attn.o_proj.bias", "d")}
QK_NORM = {
    "block.mixer.q_norm": Stored("self_attn.q_norm.weight", "h"),
    "block.mixer.k_norm": Stored("self_attn.k_norm.weight", "h"),
}
GATED_FFN = {
    "block.mlp.gate_proj": Stored("mlp.gate_proj.weight", "fd"),
    "block.mlp.up_proj": Stored("mlp.up_proj.weight", "fd"),
    "block.mlp.down_proj": Stored("mlp.down_proj.weight", "df"),
}
# Buffers that old Llama checkpoints saved; the rotary frequencies follow from the config.
_RECOMPUTED = "self_attn.rotary_emb.inv_freq"


# GGUF's name of a module below `blk.{index}.` -> the checkpoint's below `model.layers.{index}.`.
GGUF_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class GgufFormat:
    """How llama.cpp stores a family: its name of the architecture, and its names of modules."""

    architecture: str
    modules: Mapping[str, str] = field(default_factory=lambda: GGUF_MODULES)


class Family:
    """A family of dense parents. This class is Llama's layer; subclasses override what differs.

    model_type: transformers' name. gguf: how GGUF files store it; None where they are refused.
    allows_partial_rotary: whether all models of the family apply `partial_rotary_factor`.
    tokens_beyond_vocabulary: tokens that the tokenizer has and the model lacks; text has none.
    """

    model_type: ClassVar[str]
    gguf: ClassVar[GgufFormat | None] = None
    allows_partial_rotary: ClassVar[bool] = False
    tokens_beyond_vocabulary: ClassVar[frozenset[str]] = frozenset()

    # What a layer has.

    def layer_tensors(self, config: PreTrainedConfig) -> dict[str, Stored]:
        """MoL's names of a layer's tensors, and how the checkpoint stores them."""
        tensors = PRE_NORMS | ATTENTION | GATED_FFN
        if self.has_qkv_bias(config):
            tensors = tensors | QKV_BIAS
        if self.has_out_bias(config):
            tensors = tensors | OUT_BIAS
        return tensors

    def has_qkv_bias(self, config: PreTrainedConfig) -> bool:
        """Whether the projections of queries, keys and values have biases."""
        return bool(config.attention_bias)

    def has_out_bias(self, config: PreTrainedConfig) -> bool:
        """Whether the output projection of attention has a bias."""
        return bool(config.attention_bias)

    def final_norm_transform(self) -> Transform | None:
        """What turns the stored weight of the final norm into MoL's; None where they are equal."""
        return None

    # What the configuration says.

    def layer_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Arguments of MoLConfig for what is special about this family's layer."""
        return {}

    def hidden_act(self, config: PreTrainedConfig) -> str:
        """The name of the FFN's activation."""
        name: str = config.hidden_act
        return name

    def rope_parameters(self, config: PreTrainedConfig) -> dict[str, Any]:
        """transformers' description of the rotary frequencies."""
        return dict(config.rope_parameters)

    def context_window(self, config: PreTrainedConfig) -> int | None:
        """The sliding window at which the context is capped; None for no cap."""
        return None

    def refuse_variant(self, config: PreTrainedConfig) -> None:
        """Raise MolError for variants of the family that MoL blocks cannot express."""
        if getattr(config, "mlp_bias", False):
            raise MolError(
                "the parent's config.json has mlp_bias: true, and MoL's FFN carries no bias",
                allowed="mlp_bias: false",
                hint="choose a parent without FFN biases, such as any Llama released by Meta",
            )
        fraction = self.rope_parameters(config).get("partial_rotary_factor", 1.0)
        if fraction != 1.0 and not self.allows_partial_rotary:
            raise MolError(
                f"the parent's config.json has partial_rotary_factor: {fraction}, which "
                f"transformers applies in some {config.model_type} models only",
                allowed="partial_rotary_factor: 1.0, but for phi3",
                hint="remove the key if the model was trained without it",
            )

    # What a GGUF file says.

    def gguf_config(self, read: Callable[[str], Any], tensors: set[str]) -> dict[str, Any]:
        """Arguments of the transformers config beyond those that all families have.

        Args:
            read: returns the file's metadata below the architecture's name, such as
                "attention.key_length"; None where there is none.
            tensors: the names of the file's tensors.
        """
        implied = read("embedding_length") // read("attention.head_count")
        return {
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "head_dim": read("attention.key_length") or implied,
        }

    def from_gguf(self, name: str, weights: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
        """The weights (float32) of GGUF tensor `name` as the checkpoint stores them."""
        return weights

    # Derived from the above.

    def layer(self, config: PreTrainedConfig, index: int) -> dict[str, Source]:
        """MoL's names, relative to `model.layers.{index}.`, with their source."""
        sizes, prefix = _sizes(config), f"model.layers.{index}."
        sources = {}
        for ours, stored in self.layer_tensors(config).items():
            shape = tuple(sizes[letter] for letter in stored.shape)
            source = Source(prefix + stored.name, shape, transform=stored.transform)
            if stored.stack:
                heights = [sizes[letter] for letter in stored.stack]
                end = list(accumulate(heights))[stored.place]
                rows = slice(end - heights[stored.place], end)
                source = replace(source, shape=(sum(heights), *shape[1:]), rows=rows)
            sources[ours] = source
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

    def context_limit(self, config: PreTrainedConfig) -> positions.ContextLimit:
        """Positions up to which MoL sees what the parent sees, and why no further."""
        return positions.context_limit(
            config.max_position_embeddings,
            self.rope_parameters(config),
            self.context_window(config),
        )

    def mol_config_kwargs(self, config: PreTrainedConfig, *, tied: bool) -> dict[str, Any]:
        """Arguments of the MoLConfig of the same model, all layers dense."""
        rope = self.rope_parameters(config)
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": head_dim(config),
            "intermediate_size": config.intermediate_size,
            "hidden_act": self.hidden_act(config),
            "mlp_gated": True,
            "attention_bias": self.has_qkv_bias(config),
            "attention_out_bias": self.has_out_bias(config),
            "qk_norm": False,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_parameters": positions.fixed_rope(rope, config.max_position_embeddings),
            "max_position_embeddings": self.context_limit(config).tokens,
            "tie_word_embeddings": tied,
            "initializer_range": config.initializer_range,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "layer_structures": ["dense"] * config.num_hidden_layers,
        } | self.layer_config(config)


def head_dim(config: PreTrainedConfig) -> int:
    """Width of an attention head; configs older than the field imply it."""
    width: int | None = getattr(config, "head_dim", None)
    if width is not None:
        return width
    return int(config.hidden_size // config.num_attention_heads)


def one_plus(weight: torch.Tensor) -> torch.Tensor:
    """1 + weight in float32, for norms that multiply by that."""
    return 1.0 + weight.to(torch.float32)


def marked_window(config: PreTrainedConfig) -> int | None:
    """The sliding window, where `layer_types` lists a layer that has it."""
    marked = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    window: int | None = config.sliding_window if marked else None
    return window


def _sizes(config: PreTrainedConfig) -> dict[str, int]:
    width = head_dim(config)
    return {
        "d": config.hidden_size,
        "q": config.num_attention_heads * width,
        "k": config.num_key_value_heads * width,
        "h": width,
        "f": config.intermediate_size,
    }
