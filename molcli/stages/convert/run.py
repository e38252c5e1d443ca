"""Convert a checkpoint, layer after layer, and report it in convert.json."""

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
from molcli.files.finite import cast
from molcli.files.folders import output_folder
from molcli.files.generation_config import read_generation, write_generation
from molcli.files.json_files import write_object
from molcli.files.receipts import RECEIPT, read_receipt
from molcli.files.tensors import ShardedWriter
from molcli.fitting.residuals import Residuals, open_residuals, relative_error
from molcli.model.checkpoint import default_device, stored_dtype
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import Layer
from molcli.progress import Progress, silent, step
from molcli.report.machine import device_name, versions
from molcli.stages.convert.layer import align_mixer, convert_layer, mixer_prefix
from molcli.stages.convert.selection import layer_costs, select_layers, with_gated_deltanet
from molcli.stages.convert.source import SourceCheckpoint, tensor_name


@dataclass(frozen=True)
class ConversionText:
    """fit, heldout: packed rows, to fit on and to measure on. data: a hash of both."""

    fit: TokenRows
    heldout: TokenRows
    data: str


def convert(
    source: SourceCheckpoint,
    text: ConversionText | None,
    recipe: Recipe,
    out: Path,
    progress: Progress = silent,
) -> None:
    """Write the converted checkpoint, tokenizer, recipe and convert.json; complete, or not at all.

    Tensors that no conversion replaces keep their bits. The receipt of the upcycling is copied if
    there is one.

    Args:
        source: the checkpoint to convert.
        text: None is allowed only where no layer is converted.
        recipe: `convert` and `calibrate.seed` are used.
        out: the folder to write.
        progress: called after each layer.

    Raises:
        MolError: where checkpoint, recipe, text or disk do not fit together.
    """
    options, config = recipe.convert, source.config
    selection = select_layers(config, options.gated_deltanet)
    if text is None and selection.layers != set():
        raise MolError(
            "there is no text to fit Gated DeltaNet to",
            allowed="packed rows, unless no layer is converted",
        )
    if text is not None:
        config.check_context(text.fit.input_ids.shape[1], "calibrate.context_length")
    receipt = read_receipt(source.folder)
    start = time.monotonic()
    size = sum(info.num_bytes for info in source.reader.tensors.values())
    with output_folder(out, need_bytes=2 * size) as staging:
        layers, costs = selection.layers, None
        if layers is None:
            assert text is not None
            costs = layer_costs(source, selection.candidates, text.fit, options.ridge, progress)
            layers = cheapest(costs, options.gated_deltanet_budget)
        after = with_gated_deltanet(config, layers)
        writer = ShardedWriter(staging)
        rows, heldout = _write_tensors(source, after, layers, text, recipe, writer, progress)
        writer.close()
        after.save_pretrained(staging)
        tokenizer = open_tokenizer(source.folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        write_generation(read_generation(source.folder, config), staging)
        save_recipe(recipe, staging / RECIPE_FILE)
        if receipt is not None:
            write_object(staging / RECEIPT, receipt)
        for row in rows:
            row["kl_alone"] = None if costs is None else costs.get(row["layer"])
        report = _report(source, after, recipe, rows, heldout)
        report["data"] = None if text is None else text.data
        report["seconds"] = round(time.monotonic() - start, 1)
        write_object(staging / "convert.json", report)


def _write_tensors(
    source: SourceCheckpoint,
    after: MoLConfig,
    layers: set[int],
    text: ConversionText | None,
    recipe: Recipe,
    writer: ShardedWriter,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, float] | None]:
    """Convert the layers and write every tensor.

    Each layer is fitted on the residual that the converted layers before it give.

    Returns:
        A row per converted layer, and the held-out losses.
    """
    replaced: set[str] = set()
    found: list[dict[str, Any]] = []
    losses = None
    if text is not None:
        device, count = default_device(), source.config.num_hidden_layers
        embedding = source.embedding()
        fit, heldout = (
            open_residuals(rows, source.config, embedding, device)
            for rows in (text.fit, text.heldout)
        )
        for i in range(count):
            softmax = converted = source.layer(i, device)
            if i in layers:
                converted, row = _convert_layer(after, i, softmax, fit, heldout, text, recipe)
                prefix = mixer_prefix(softmax)
                replaced |= {
                    tensor_name(i, n) for n in softmax.state_dict() if n.startswith(prefix)
                }
                for name, tensor in converted.state_dict().items():
                    if name.startswith(prefix):
                        dtype = stored_dtype(name, embedding.dtype)
                        full = tensor_name(i, name)
                        writer.add(full, cast(full, tensor, dtype))
                found.append(row)
            for residuals in (fit, heldout):
                residuals.advance(softmax, converted)
            if i in layers:
                found[-1]["residual_error"] = heldout.error()
            progress(i + 1, count)
        with step(progress, "comparing"):
            losses = source.output_head(device).losses(heldout, heldout.student)
    for name in source.reader.tensors:
        if name not in replaced:
            writer.add(name, source.reader.read(name))
    return found, losses


def _convert_layer(
    after: MoLConfig,
    index: int,
    softmax: Layer,
    fit: Residuals,
    heldout: Residuals,
    text: ConversionText,
    recipe: Recipe,
) -> tuple[Layer, dict[str, Any]]:
    """Fit and train the converted layer. Returns it and its row of the report."""
    options, x = recipe.convert, fit.student
    layer = convert_layer(after, index, softmax, x, fit.chunks, options.ridge)
    start = end = _delta_error(heldout, softmax, layer)
    if options.steps:
        align_mixer(after, layer, softmax, x, text.fit, options, recipe.calibrate.seed)
        end = _delta_error(heldout, softmax, layer)
    return layer, {
        "layer": index,
        "kind": after.layer_labels[index],
        "delta_error_start": start,
        "delta_error": end,
    }


@torch.no_grad()
def _delta_error(heldout: Residuals, softmax: Layer, converted: Layer) -> float:
    """Mean over held-out tokens of the relative squared error of what the layer adds, both layers
    on the converted model's residual."""
    x = heldout.student
    wanted, found = (heldout.chunks.run(layer, x) - x for layer in (softmax, converted))
    return relative_error(found, wanted)


def _report(
    source: SourceCheckpoint,
    after: MoLConfig,
    recipe: Recipe,
    layers: list[dict[str, Any]],
    heldout: dict[str, float] | None,
) -> dict[str, Any]:
    """Assemble convert.json as plain values.

    layers: a row per converted layer, on held-out tokens, all errors relative squared ones.
        delta_error_start, delta_error: of what the layer adds, before and after the steps of Adam,
        on the converted model's own residual. residual_error: of the residual after the layer,
        against the original model's. kl_alone: what `auto` measured.
    heldout: cross-entropy of both models, and KL(original || converted), nats per token.
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
