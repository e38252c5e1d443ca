"""Rotary position embeddings, with all the scalings that transformers knows."""

from typing import Any

from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from molcli.model.configuration_mol import MoLConfig


def rotary_embedding(config: MoLConfig) -> LlamaRotaryEmbedding:
    """x (for its dtype), position_ids (B, T) -> cos and sin, (B, T, head_dim)."""
    named_alike: Any = config  # it reads rope_parameters, head_dim and max_position_embeddings
    return LlamaRotaryEmbedding(config=named_alike)
