"""Llama, and models with its layer, such as SmolLM2."""

import torch
from transformers import PreTrainedConfig

from molcli.families.base import Family, GgufFormat


class Llama(Family):
    """The layer that `Family` describes; biases where the config's `attention_bias` says so."""

    model_type = "llama"
    gguf = GgufFormat("llama")

    def from_gguf(self, name: str, weights: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
        """llama.cpp rotates neighbouring channels of a Llama head, transformers its two halves."""
        module = name.split(".")[-2]
        if module not in ("attn_q", "attn_k"):
            return weights
        heads = config.num_attention_heads if module == "attn_q" else config.num_key_value_heads
        halves = weights.view(heads, -1, 2, *weights.shape[1:]).transpose(1, 2)
        return halves.reshape(weights.shape)
