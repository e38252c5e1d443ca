"""Rotary position embeddings, with all the scalings that transformers knows."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from molcli.model.configuration_mol import MoLConfig

_BY_LENGTH = ("dynamic", "longrope")


def reads_positions_back(config: MoLConfig) -> bool:
    """Return whether frequencies depend on the largest position.

    Reading it synchronises with the host, which a CUDA graph cannot do.
    """
    assert config.rope_parameters is not None
    return config.rope_parameters["rope_type"] in _BY_LENGTH


def rotary_embedding(config: MoLConfig) -> nn.Module:
    """Make the module that computes cos and sin of positions (arXiv 2104.09864).

    Phi-3's class is Llama's with a `partial_rotary_factor` of head_dim.

    Returns:
        A module: x (for its dtype), position_ids (B, T) -> cos and sin, each (B, T, channels that
        rotate). With a second base for layers with a sliding window, its channels follow the
        first's.
    """
    same_names: Any = config  # it reads rope_parameters, head_dim and max_position_embeddings
    everywhere = Phi3RotaryEmbedding(config=same_names)
    if config.rope_theta_local is None:
        return everywhere
    local: Any = copy.copy(config)
    local.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_theta_local}
    return TwoBases(everywhere, Phi3RotaryEmbedding(config=local))


class TwoBases(nn.Module):
    """Two rotary embeddings, their channels side by side."""

    def __init__(self, first: Phi3RotaryEmbedding, second: Phi3RotaryEmbedding) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cos and sin, each (B, T, 2 r). x: for its dtype; position_ids: (B, T)."""
        both = self.first(x, position_ids), self.second(x, position_ids)
        cos, sin = (torch.cat(parts, dim=-1) for parts in zip(*both, strict=True))
        return cos, sin
