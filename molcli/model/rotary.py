"""Rotary position embeddings, with all the scalings that transformers knows."""

from typing import Any

from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from molcli.model.configuration_mol import MoLConfig

_BY_LENGTH = ("dynamic", "longrope")


def reads_positions_back(config: MoLConfig) -> bool:
    """Whether frequencies depend on the largest position, for which the device is waited for: what
    a CUDA graph cannot do."""
    assert config.rope_parameters is not None
    return config.rope_parameters["rope_type"] in _BY_LENGTH


def rotary_embedding(config: MoLConfig) -> Phi3RotaryEmbedding:
    """x (for its dtype), position_ids (B, T) -> cos and sin, (B, T, channels that turn).

    Phi-3's is Llama's with a `partial_rotary_factor` of head_dim.
    """
    named_alike: Any = config  # it reads rope_parameters, head_dim and max_position_embeddings
    return Phi3RotaryEmbedding(config=named_alike)
