"""Dense models with fewer of the parent's layers: what a conversion has to beat.

"skipped": without the layers that would be converted. "depth_pruned": without the least influential
ones, as many as bring the parent down to the conversion's active parameters. The same two as in
a full receipt, as checkpoints: to be measured on any text, and trained.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from molcli.data.packing import TokenRows
from molcli.estimate.parameters import count_parameters
from molcli.estimate.time import parent_of
from molcli.families.parent import Parent
from molcli.model import MoLConfig, MoLForCausalLM
from molcli.model.parent import load_dense

Cut = Literal["skipped", "depth_pruned"]
CUTS: tuple[Cut, ...] = ("skipped", "depth_pruned")
ROWS = 16  # at a time


def kept_layers(cut: Cut, shape: MoLConfig, influence: Callable[[], list[float]]) -> list[int]:
    """Of the parent of a conversion of this shape, ascending. influence: of each layer."""
    layers = range(shape.num_hidden_layers)
    if cut == "skipped":
        return [i for i in layers if shape.is_dense(i)]
    dense = count_parameters(parent_of(shape))
    rest = dense.embedding + shape.hidden_size  # and the final norm
    one = (dense.total - rest) // shape.num_hidden_layers
    count = max(0, (count_parameters(shape).active - rest) // one)
    found = influence()
    return sorted(sorted(layers, key=lambda i: -found[i])[:count])


@torch.no_grad()
def influences(parent: MoLForCausalLM, rows: TokenRows) -> list[float]:
    """By layer, one minus the mean cosine of its input and output (arXiv 2403.03853)."""
    sums = [0.0] * len(parent.model.layers)

    def add(index: int) -> Callable[..., None]:
        def hook(
            _: nn.Module, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor]
        ) -> None:
            alike = F.cosine_similarity(inputs[0].float(), output[0].float(), dim=-1)
            sums[index] += (1 - alike).double().sum().item()

        return hook

    hooks = [layer.register_forward_hook(add(i)) for i, layer in enumerate(parent.model.layers)]
    for batch in rows.batches(ROWS, parent.device):
        parent.model(**batch.inputs(), use_cache=False)
    for handle in hooks:
        handle.remove()
    return [total / rows.tokens for total in sums]


def write_dense(parent: Parent, layers: list[int], out: Path) -> None:
    """The parent with these layers alone, as a checkpoint."""
    model = load_dense(parent, parent.embedding().dtype, torch.device("cpu"))
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in layers)
    model.config.num_hidden_layers = len(layers)
    model.config.layer_structures = ["dense"] * len(layers)
    model.config.layer_mixers = ["attention"] * len(layers)
    model.save_pretrained(out)
    parent.copy_tokenizer(out)
