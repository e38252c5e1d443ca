"""Conversions that look at no text: from the weights alone, or from chance."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from molcli.config.sections import Recipe
from molcli.families.parent import Parent
from molcli.files.tensors import ShardedWriter
from molcli.fitting.baselines import ParentLayer, baseline_layer
from molcli.fitting.layer import FittedLayer, copied_tensors
from molcli.fitting.shapes import is_copy, parts
from molcli.model.checkpoint import default_device, stored_dtype
from molcli.model.configuration_mol import MoLConfig
from molcli.model.parent import dense_layer
from molcli.progress import Progress

EMBEDDINGS = 2048  # of the vocabulary, evenly spread, whose clusters routers start from


@torch.no_grad()
def convert_without_text(
    parent: Parent, config: MoLConfig, recipe: Recipe, writer: ShardedWriter, progress: Progress
) -> list[dict[str, Any]]:
    """Writes the layers; returns a row for the receipt about each. Of the parent, only layers
    whose weights count are read; kept and copied ones pass as they are stored."""
    device, embedding = default_device(), parent.embedding()
    x = embedding[:: -(-len(embedding) // EMBEDDINGS)].to(device, torch.float32)
    del embedding
    rows = []
    for i in range(config.num_hidden_layers):
        row: dict[str, Any] = {"layer": i, "kind": config.layer_labels[i]}
        if config.is_dense(i):
            add_layer(writer, config, i, parent.dense_layer(i))
        elif is_copy(config, recipe.upcycle):
            add_layer(writer, config, i, copied_tensors(parent.dense_layer(i)))
            row["retained_energy"] = [1.0]
        else:
            fitted = _started(parent, config, i, x, recipe)
            add_layer(writer, config, i, fitted.layer.state_dict())
            row["retained_energy"] = fitted.retained
            del fitted  # the next layer needs its room
        rows.append(row)
        progress(i + 1, config.num_hidden_layers)
    return rows


def add_layer(
    writer: ShardedWriter, config: MoLConfig, index: int, tensors: Mapping[str, Tensor]
) -> None:
    """Of layer `index`, in the checkpoint's dtype."""
    assert isinstance(config.dtype, torch.dtype)
    for name, tensor in tensors.items():
        dtype = stored_dtype(name, config.dtype)
        writer.add(f"model.layers.{index}.{name}", tensor.to(dtype))


def _started(
    parent: Parent, config: MoLConfig, index: int, x: Tensor, recipe: Recipe
) -> FittedLayer:
    method = recipe.upcycle.method
    assert method != "fitted"
    dense = None if method == "random" else dense_layer(parent, config, index, x.device)
    source = ParentLayer(index, dense, parts(config), x, None)
    return baseline_layer(method, config, source, recipe.calibrate.seed)
