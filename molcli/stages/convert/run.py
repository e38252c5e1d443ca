"""Convert a checkpoint, layer after layer, and report it in convert.json."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from molcli.config.layer_choice import cheapest
from molcli.config.recipe import RECIPE_FILE, save_recipe
from molcli.config.sections import Recipe
from molcli.data.packing import TokenRows
from molcli.data.tokenizer import open_tokenizer
from molcli.errors import MolError
from molcli.estimate.parameters import count_parameters
from molcli.files.folders import output_folder
from molcli.files.generation_config import read_generation, write_generation
from molcli.files.tensors import ShardedWriter
from molcli.fitting.streams import Streams, open_streams, relative_error
from molcli.model.checkpoint import default_device, stored_dtype
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import Layer
from molcli.progress import Progress, silent
from molcli.report.machine import device_name, versions
from molcli.stages.convert.choice import converted_config, layer_costs, plan_layers
from molcli.stages.convert.layer import align, convert_layer, mixer_prefix
from molcli.stages.convert.source import Source, layer_name


def report(
    source: Source,
    after: MoLConfig,
    recipe: Recipe,
    layers: list[dict[str, Any]],
    heldout: dict[str, float] | None,
) -> dict[str, Any]:
    """Plain values.

    layers: a row per converted layer, on held-out tokens: delta_error_start and delta_error, before
    and after the steps of Adam, of what the layer adds, on the converted model's own residual;
    residual_error, of the residual after it, towards the original model's; kl_alone, what `auto`
    measured. All errors are relative squared ones. heldout: cross-entropy of both models, and
    KL(original || converted), nats a token.
    """
    before_count, after_count = count_parameters(source.config), count_parameters(after)
    losses = None
    if heldout is not None:
        losses = {
            "tokens": heldout["tokens"],
            "original_ce": heldout["parent_ce"],
            "ce": heldout["ce"],
            "kl": heldout["kl"],
        }
    return {
        "checkpoint": {
            "folder": str(source.folder),
            "fingerprint": source.reader.fingerprint(),
        },
        "seed": recipe.calibrate.seed,
        "parameters": {
            "original_total": before_count.total,
            "original_active": before_count.active,
            "total": after_count.total,
            "active": after_count.active,
        },
        "heldout": losses,
        "layers": layers,
        "versions": versions(),
        "device": device_name(default_device()),
    }


UPCYCLE_RECEIPT = "receipt.json"


@dataclass(frozen=True)
class Text:
    """fit, heldout: packed rows, to fit on and to measure on. data: a hash of both."""

    fit: TokenRows
    heldout: TokenRows
    data: str


def convert(
    source: Source, text: Text | None, recipe: Recipe, out: Path, progress: Progress = silent
) -> None:
    """Writes the converted checkpoint, its tokenizer, generation_config.json, recipe and
    convert.json; whole, or not at all.

    text: None only where no layer is converted. Tensors that no conversion touches keep their very
    bits. The receipt of the upcycling, if there is one, is copied.
    Raises MolError where checkpoint, recipe, text or disk do not fit together.
    """
    options, config = recipe.convert, source.config
    plan = plan_layers(config, options.gated_deltanet)
    if text is None and plan.layers != set():
        raise MolError(
            "there is no text to fit Gated DeltaNet to",
            allowed="packed rows, unless no layer is converted",
        )
    start = time.monotonic()
    size = sum(info.num_bytes for info in source.reader.tensors.values())
    with output_folder(out, need_bytes=2 * size) as staging:
        layers, costs = plan.layers, None
        if layers is None:
            assert text is not None
            costs = layer_costs(source, plan.candidates, text.fit, options.ridge, progress)
            layers = cheapest(costs, options.gated_deltanet_budget)
        after = converted_config(config, layers)
        writer = ShardedWriter(staging)
        rows, heldout = _convert(source, after, layers, text, recipe, writer, progress)
        writer.close()
        after.save_pretrained(staging)
        tokenizer = open_tokenizer(source.folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        write_generation(read_generation(source.folder, config), staging)
        save_recipe(recipe, staging / RECIPE_FILE)
        if (source.folder / UPCYCLE_RECEIPT).is_file():
            shutil.copy(source.folder / UPCYCLE_RECEIPT, staging)
        for row in rows:
            row["kl_alone"] = None if costs is None else costs.get(row["layer"])
        found = report(source, after, recipe, rows, heldout)
        found["data"] = None if text is None else text.data
        found["seconds"] = round(time.monotonic() - start, 1)
        (staging / "convert.json").write_text(json.dumps(found, indent=2) + "\n")


def _convert(
    source: Source,
    after: MoLConfig,
    layers: set[int],
    text: Text | None,
    recipe: Recipe,
    writer: ShardedWriter,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, float] | None]:
    """Writes every tensor; returns a row per converted layer, and the held-out losses.

    Each layer is fitted on the residual that the converted layers before it really give.
    """
    replaced: set[str] = set()
    found: list[dict[str, Any]] = []
    losses = None
    if text is not None:
        device, count = default_device(), source.config.num_hidden_layers
        embedding = source.embedding()
        fit, heldout = (
            open_streams(rows, source.config, embedding, device)
            for rows in (text.fit, text.heldout)
        )
        for i in range(count):
            softmax = converted = source.layer(i, device)
            if i in layers:
                converted, row = _converted(after, i, softmax, fit, heldout, text, recipe)
                prefix = mixer_prefix(softmax)
                replaced |= {layer_name(i, n) for n in softmax.state_dict() if n.startswith(prefix)}
                for name, tensor in converted.state_dict().items():
                    if name.startswith(prefix):
                        dtype = stored_dtype(name, embedding.dtype)
                        writer.add(layer_name(i, name), tensor.to(dtype))
                found.append(row)
            for streams in (fit, heldout):
                streams.advance(softmax, converted)
            if i in layers:
                found[-1]["residual_error"] = heldout.error()
            progress(i + 1, count, "converting")
        losses = source.ending(device).figures(heldout, heldout.student)
    for name in source.reader.tensors:
        if name not in replaced:
            writer.add(name, source.reader.read(name))
    return found, losses


def _converted(
    after: MoLConfig,
    index: int,
    softmax: Layer,
    fit: Streams,
    heldout: Streams,
    text: Text,
    recipe: Recipe,
) -> tuple[Layer, dict[str, Any]]:
    """The converted layer, fitted and aligned, and its row of the report."""
    options, x = recipe.convert, fit.student
    layer = convert_layer(after, index, softmax, x, fit.chunks, options.ridge)
    start = end = _delta_error(heldout, softmax, layer)
    if options.steps:
        align(after, layer, softmax, x, text.fit, options, recipe.calibrate.seed)
        end = _delta_error(heldout, softmax, layer)
    return layer, {
        "layer": index,
        "kind": after.layer_labels[index],
        "delta_error_start": start,
        "delta_error": end,
    }


@torch.no_grad()
def _delta_error(heldout: Streams, softmax: Layer, converted: Layer) -> float:
    """Mean over held-out tokens of the squared error of what the layer adds, relative to what it
    adds with softmax, both on the converted model's residual."""
    x = heldout.student
    wanted, have = (heldout.chunks.run(layer, x) - x for layer in (softmax, converted))
    return relative_error(have, wanted)
