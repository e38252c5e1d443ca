"""Baselines of a conversion: dense models with a part of the parent.

"skipped" drops the layers that would be converted. "depth_pruned" drops the least influential
layers, as many as bring the parent down to the conversion's active parameters. A full receipt has
the same two baselines; here they are checkpoints that can be evaluated on any text, and trained.
"width_pruned" keeps all layers and heads, and in each layer the neurons with the largest
activations, as many as the conversion's active parameters allow (as Minitron, arXiv 2407.14679;
heads have a small part of the weights, and carry recall, so that neurons go first).
"""

from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from molcli.data.packing import TokenRows
from molcli.estimate.cost import parent_config
from molcli.estimate.parameters import count_parameters
from molcli.families.parent import Parent
from molcli.model import MoLConfig, MoLForCausalLM
from molcli.model.parent import load_dense

Cut = Literal["skipped", "depth_pruned", "width_pruned"]
CUTS: tuple[Cut, ...] = ("skipped", "depth_pruned", "width_pruned")
ROWS = 16  # of a batch


def kept_layers(cut: Cut, shape: MoLConfig, influence: Callable[[], list[float]]) -> list[int]:
    """Return the indices of the parent's layers that a baseline keeps, ascending.

    Args:
        cut: the baseline.
        shape: configuration of the conversion that it is compared with.
        influence: returns the influence of each layer.
    """
    layers = range(shape.num_hidden_layers)
    if cut == "skipped":
        return [i for i in layers if shape.is_dense(i)]
    count = max(0, int(_budget(shape) // _layer_size(shape)))
    scores = influence()
    return sorted(sorted(layers, key=lambda i: -scores[i])[:count])


def kept_neurons(shape: MoLConfig) -> int:
    """Return how many neurons of each layer "width_pruned" keeps.

    shape: configuration of the conversion that it is compared with.

    Raises:
        ValueError: the budget has no room for them beside the heads.
    """
    removed = _layer_size(shape) - _budget(shape) / shape.num_hidden_layers
    matrices = 3 if shape.mlp_gated else 2
    neurons = shape.intermediate_size - ceil(removed / (matrices * shape.hidden_size))
    if neurons < 1:
        raise ValueError("the active parameters leave no room for neurons beside all heads")
    return min(neurons, shape.intermediate_size)


def _budget(shape: MoLConfig) -> int:
    """Active parameters of all layers."""
    count = count_parameters(shape)
    return count.active - count.embedding - shape.hidden_size  # without the final norm


def _layer_size(shape: MoLConfig) -> float:
    """Parameters of one of the parent's layers."""
    dense = count_parameters(parent_config(shape))
    return (dense.non_embedding - shape.hidden_size) / shape.num_hidden_layers


@torch.no_grad()
def activations(parent: MoLForCausalLM, rows: TokenRows) -> list[torch.Tensor]:
    """Return for each layer the root mean square of each neuron's activation, (d_ff,) float64."""
    networks = [layer.block.mlp for layer in parent.model.layers]
    sums: list[Any] = [0.0] * len(networks)

    def add(index: int) -> Callable[..., None]:
        def hook(network: Any, inputs: tuple[Any, ...]) -> None:
            sums[index] += network.hidden(*inputs).double().square().sum(0)

        return hook

    hooks = [n.register_forward_pre_hook(add(i)) for i, n in enumerate(networks)]
    for batch in rows.batches(ROWS, parent.device):
        parent.model(**batch.inputs(), use_cache=False)
    for handle in hooks:
        handle.remove()
    return [(total / rows.tokens).sqrt() for total in sums]


@torch.no_grad()
def influences(parent: MoLForCausalLM, rows: TokenRows) -> list[float]:
    """Return for each layer 1 - the mean cosine of its input and output (arXiv 2403.03853)."""
    sums = [0.0] * len(parent.model.layers)

    def add(index: int) -> Callable[..., None]:
        def hook(
            _: nn.Module, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor]
        ) -> None:
            cosine = F.cosine_similarity(inputs[0].float(), output[0].float(), dim=-1)
            sums[index] += (1 - cosine).double().sum().item()

        return hook

    hooks = [layer.register_forward_hook(add(i)) for i, layer in enumerate(parent.model.layers)]
    for batch in rows.batches(ROWS, parent.device):
        parent.model(**batch.inputs(), use_cache=False)
    for handle in hooks:
        handle.remove()
    return [total / rows.tokens for total in sums]


def write_dense(parent: Parent, layers: list[int], out: Path) -> None:
    """Write the parent with only these layers as a checkpoint."""
    model = load_dense(parent, parent.embedding().dtype, torch.device("cpu"))
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in layers)
    model.config.num_hidden_layers = len(layers)
    model.config.layer_structures = ["dense"] * len(layers)
    model.config.layer_mixers = ["attention"] * len(layers)
    model.save_pretrained(out)
    parent.copy_tokenizer(out)


@torch.no_grad()
def write_narrow(parent: Parent, scores: list[torch.Tensor], count: int, out: Path) -> None:
    """Write the parent with these neurons as a checkpoint.

    Args:
        parent: the dense model.
        scores: (d_ff,) for each layer; those with the highest are kept.
        count: neurons to keep in each layer.
        out: folder to write.
    """
    model = load_dense(parent, parent.embedding().dtype, torch.device("cpu"))
    for layer, score in zip(model.model.layers, scores, strict=True):
        kept = score.topk(count).indices.sort().values.cpu()
        network = layer.block.mlp
        for name in ("gate_proj", "up_proj", "down_proj"):
            if (weight := getattr(network, name)) is not None:
                part = weight[:, :, kept] if name == "down_proj" else weight[:, kept]
                setattr(network, name, nn.Parameter(part))
    model.config.intermediate_size = count
    model.save_pretrained(out)
    parent.copy_tokenizer(out)
