"""The text models of Gemma 3: norms on both sides of attention and FFN, local and global layers.

Its norms multiply by 1 + weight; the embeddings are scaled by sqrt(hidden_size); most layers attend
within a sliding window, with a rotary base of their own.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from molcli.errors import MolError
from molcli.families.base import (
    ATTENTION,
    GATED_FFN,
    GGUF_MODULES,
    OUT_BIAS,
    QKV_BIAS,
    Family,
    GgufFormat,
    Stored,
    Transform,
    head_dim,
    one_plus,
)
from molcli.families.positions import gguf_rope

_NORMS = {
    "block.input_norm": Stored("input_layernorm.weight", "d", transform=one_plus),
    "block.mixer_out_norm": Stored("post_attention_layernorm.weight", "d", transform=one_plus),
    "block.post_norm": Stored("pre_feedforward_layernorm.weight", "d", transform=one_plus),
    "block.mlp_out_norm": Stored("post_feedforward_layernorm.weight", "d", transform=one_plus),
}
_GGUF_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# What llama.cpp knows without the file: every sixth layer is global, local ones have this base, and
# the model of 62 layers (27B) scales queries by hidden_size / heads, others by the head's width.
_GLOBAL_EVERY, _LOCAL_BASE, _LAYERS_OF_27B = 6, 10_000.0, 62


class Gemma3(Family):
    """The attention scale is folded into the queries' norm, `1 + weight` into all norms."""

    model_type = "gemma3_text"
    gguf = GgufFormat("gemma3", GGUF_MODULES | _GGUF_NORMS)
    tokens_beyond_vocabulary = frozenset({"<image_soft_token>"})  # of the models with images

    def layer_tensors(self, config: PreTrainedConfig) -> dict[str, Stored]:
        # MoL scales scores by head_dim^-0.5, Gemma by query_pre_attn_scalar^-0.5.
        factor = (head_dim(config) / config.query_pre_attn_scalar) ** 0.5
        scaled = partial(_scaled_one_plus, factor=factor)
        qk_norms = {
            "block.mixer.q_norm": Stored("self_attn.q_norm.weight", "h", transform=scaled),
            "block.mixer.k_norm": Stored("self_attn.k_norm.weight", "h", transform=one_plus),
        }
        biases = QKV_BIAS | OUT_BIAS if config.attention_bias else {}
        return _NORMS | qk_norms | ATTENTION | GATED_FFN | biases

    def final_norm_transform(self) -> Transform | None:
        return one_plus

    def layer_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        local = [kind == "sliding_attention" for kind in config.layer_types]
        return {
            "qk_norm": True,
            "output_norms": True,
            "embedding_scale": config.hidden_size**0.5,
            "sliding_windows": [config.sliding_window if each else None for each in local],
            "rope_theta_local": config.rope_parameters["sliding_attention"]["rope_theta"],
        }

    def hidden_act(self, config: PreTrainedConfig) -> str:
        name: str = config.hidden_activation
        return name

    def rope_parameters(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Those of global layers."""
        return dict(config.rope_parameters["full_attention"])

    def refuse_variant(self, config: PreTrainedConfig) -> None:
        super().refuse_variant(config)
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, key) is not None:
                raise MolError(
                    f"the parent's config.json has {key}: {getattr(config, key)}, and MoL has no "
                    "soft caps",
                    allowed=f"{key}: null",
                    hint="choose a Gemma 3 as Google released it",
                )
        if config.use_bidirectional_attention:
            raise MolError(
                "the parent's config.json has use_bidirectional_attention: true, and MoL's "
                "attention is causal",
                allowed="use_bidirectional_attention: false",
                hint="choose a Gemma 3 that predicts the next token, not an embedding model",
            )
        if (kind := config.rope_parameters["sliding_attention"]["rope_type"]) != "default":
            raise MolError(
                f"the parent's config.json scales the rotary frequencies of local layers ({kind})",
                allowed="rope_parameters.sliding_attention.rope_type: default",
                hint="choose a Gemma 3 as Google released it",
            )

    def gguf_config(
        self, path: Path, read: Callable[[str], Any], tensors: set[str]
    ) -> dict[str, Any]:
        layers, width = read("block_count"), read("attention.key_length") or 256
        heads = read("embedding_length") // read("attention.head_count")
        every = read("attention.sliding_window_pattern") or _GLOBAL_EVERY
        window = read("attention.sliding_window") or None
        local = read("rope.freq_base_swa") or _LOCAL_BASE
        return {
            "head_dim": width,
            "query_pre_attn_scalar": heads if layers == _LAYERS_OF_27B else width,
            "sliding_window": window,
            "layer_types": [
                "full_attention" if window is None or (i + 1) % every == 0 else "sliding_attention"
                for i in range(layers)
            ],
            "rope_parameters": {
                "full_attention": gguf_rope(path, read, 1_000_000.0),
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            },
        }

    def from_gguf(self, name: str, weights: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
        """llama.cpp adds the 1 to the weights of norms."""
        return weights - 1.0 if name.endswith("norm.weight") else weights


def _scaled_one_plus(weight: torch.Tensor, factor: float) -> torch.Tensor:
    return factor * one_plus(weight)
