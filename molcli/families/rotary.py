"""Rotary position embeddings, with all the scalings that transformers knows.

`check_rotary` compares them, for each parent that is opened, with those of the parent's own class
in transformers: a configuration has several spellings.
"""

import copy
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from molcli.errors import MolError

_BY_LENGTH = ("dynamic", "longrope")
# Relative to the angle: the frequencies of both have to be equal but for rounding.
_TOLERANCE = 1e-6
_READ = (
    *("rope_parameters", "head_dim", "max_position_embeddings"),
    *("hidden_size", "num_attention_heads"),  # which imply head_dim in other models
)
# What transformers raises for parameters that are missing, or of wrong types, sizes or values.
INVALID_CONFIG = (
    *(ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)


def reads_positions_back(config: PreTrainedConfig) -> bool:
    """Return whether frequencies depend on the largest position.

    Reading it synchronises with the host, which a CUDA graph cannot do.
    """
    assert config.rope_parameters is not None
    return config.rope_parameters["rope_type"] in _BY_LENGTH


def rotary_embedding(config: PreTrainedConfig) -> nn.Module:
    """Make the module that computes cos and sin of positions (arXiv 2104.09864).

    Phi-3's class is Llama's with a `partial_rotary_factor` of head_dim.

    Args:
        config: rope_parameters, rope_theta_local, head_dim and max_position_embeddings are read.

    Returns:
        A module: x (for its dtype), position_ids (B, T) -> cos and sin, each (B, T, channels that
        rotate). With a second base for layers with a sliding window, its channels follow the
        first's.
    """
    same_names: Any = config
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


def check_rotary(config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """Check that our rotary embedding is the parent's, up to our number of positions.

    Args:
        config: the parent's.
        kwargs: arguments of its MoLConfig.

    Raises:
        MolError: if transformers cannot make it, or ours differs.
    """
    same: dict[str, Any] = {"rope_theta_local": kwargs.get("rope_theta_local")}
    same |= {name: copy.deepcopy(kwargs[name]) for name in _READ}
    last = kwargs["max_position_embeddings"] - 1
    try:
        ours = rotary_embedding(PreTrainedConfig(**same))
        theirs = _their_embedding(config)
        # A short and a long sequence: some frequencies depend on the length.
        texts = [torch.tensor([[0, min(1, last)]]), torch.tensor([[0, min(7, last), last]])]
        for positions in texts:
            angles = zip(_ours(ours, positions), _theirs(theirs, positions), strict=True)
            for found, wanted in angles:
                if wanted is not None and not _equal(found, wanted, positions):
                    raise _refused(config, "describes a rotary embedding that differs in MoL")
    except INVALID_CONFIG as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise _refused(config, f"describes no rotary embedding ({reason[:200]})") from error


def _refused(config: PreTrainedConfig, problem: str) -> MolError:
    shown = ", ".join(
        f"{key}: {value}" for key, value in dict(config.rope_parameters or {}).items()
    )
    return MolError(
        f"the parent's config.json {problem}: {shown[:200]}",
        allowed=f"rope_parameters of type default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}, with "
        "what that type needs",
        hint="use the config.json that was published with the weights",
    )


def _their_embedding(config: PreTrainedConfig) -> Any:
    """The embedding of the parent's class, as its model in transformers makes it."""
    module = import_module(type(config).__module__.replace("configuration_", "modeling_"))
    [kind] = [
        value
        for name, value in vars(module).items()
        if name.endswith("RotaryEmbedding") and value.__module__ == module.__name__
    ]
    return kind(config=copy.deepcopy(config))


def _ours(module: nn.Module, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """cos and sin of global layers, then of local ones."""
    parts = [module.first, module.second] if isinstance(module, TwoBases) else [module]
    for part in parts:
        yield part(torch.zeros(()), positions)


def _theirs(module: Any, positions: Tensor) -> Iterator[tuple[Tensor, Tensor] | None]:
    """The same; None for a kind of layer that the parent does not have."""
    if not isinstance(module.rope_type, dict):
        yield module(torch.zeros(()), positions)
        return
    for kind in ("full_attention", "sliding_attention"):
        yield module(torch.zeros(()), positions, kind) if kind in module.rope_type else None


def _equal(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], positions: Tensor) -> bool:
    """Whether cos and sin are equal up to rounding, and finite."""
    allowed = _TOLERANCE * (1 + positions[..., None])
    return all(
        a.shape == b.shape and bool(((a - b).abs() <= allowed * b.abs().max().clamp(min=1)).all())
        for a, b in zip(found, wanted, strict=True)
    )
