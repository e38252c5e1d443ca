"""Compiled layers, for GPUs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Fusing a norm's backward pass with the gradient of its weight, torch 2.10 to 2.13 give a wrong
# shape, or wrong numbers without a word, where there are many rows (pytorch #178080, #193061).
_OPTIONS: dict[str, Any] = {"triton.mix_order_reduction": False}
# All layers, the parent's too, share one count of graphs, past which torch goes on eagerly. Its 8
# are few for a run of stages: each is one for model and parent, with and without gradients, for a
# context length and then for any.
_GRAPHS = 64


def compile_layers(model: "PreTrainedModel") -> None:
    """Compiles the layers, not the model: one graph serves all layers of a kind, and nothing in it
    depends on the batch but the number of documents, which becomes symbolic in the second batch.
    """
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in model.model.layers:
        layer.compile(options=_OPTIONS)


def compile_part(part: Callable[..., Any]) -> Callable[..., Any]:
    """A part of a layer, a function of the layer and of what it reads, compiled like layers."""
    return torch.compile(part, options=_OPTIONS)
