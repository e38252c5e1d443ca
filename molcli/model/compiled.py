"""Compile layers with torch.compile, for GPUs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# With many rows, torch 2.10 to 2.13 fuse a norm's backward pass with the gradient of its weight
# wrongly: the shape is wrong, or the numbers are, without an error (pytorch #178080, #193061).
_OPTIONS: dict[str, Any] = {"triton.mix_order_reduction": False}
# All layers, the parent's too, share one limit of compiled graphs, past which torch runs eagerly.
# Its default of 8 is too small for a run of stages: model and parent, with and without gradients,
# for one context length and then for any, need a graph each.
_GRAPHS = 64


def compile_layers(model: "PreTrainedModel") -> None:
    """Compile each layer, not the model.

    One graph serves all layers of a kind. Of the batch it depends on the number of documents only,
    which becomes symbolic in the second batch.

    Args:
        model: ours, or a transformers model with `model.layers`; changed in place.
    """
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in model.model.layers:
        layer.compile(options=_OPTIONS)


def compile_part(part: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a part of a layer, a function of the layer and its inputs, with the same options."""
    return torch.compile(part, options=_OPTIONS)
