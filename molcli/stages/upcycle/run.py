"""The conversion, layer after layer."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from molcli.config.layer_choice import cheapest
from molcli.config.recipe import RECIPE_FILE, save_recipe
from molcli.config.sections import Recipe
from molcli.errors import MolError
from molcli.io.calibration import Calibration, open_calibration
from molcli.io.folder import output_folder
from molcli.io.parent import Parent
from molcli.io.tensors import ShardedWriter
from molcli.maths.parameters import count_parameters
from molcli.model.checkpoint import default_device, stored_dtype
from molcli.model.configuration_mol import MoLConfig
from molcli.model.ending import open_ending
from molcli.model.from_parent import dense_layer
from molcli.model.layers import DenseLayer, MoLLayer
from molcli.model.streams import Streams, open_streams
from molcli.progress import Progress, silent
from molcli.stages.upcycle.baselines import ParentLayer, baseline_layer
from molcli.stages.upcycle.comparison import Comparison
from molcli.stages.upcycle.continuations import continuations
from molcli.stages.upcycle.figures import advance
from molcli.stages.upcycle.layer import FittedLayer, copy_layer, fit_layer
from molcli.stages.upcycle.page import receipt_page
from molcli.stages.upcycle.receipt import Measured, receipt
from molcli.stages.upcycle.selection import deltanet_costs
from molcli.stages.upcycle.shape import is_copy, mol_config, parts
from molcli.stages.upcycle.teacher import Teacher


def upcycle(
    parent: Parent,
    calibration: Path | None,
    recipe: Recipe,
    out: Path,
    progress: Progress = silent,
) -> None:
    """Writes a checkpoint with config, tokenizer, recipe and receipt; whole, or not at all.

    calibration: a folder that calibrate wrote; needed for all but exact copies. The parent is read,
    and the checkpoint written, one layer at a time.
    Raises MolError where recipe, parent, calibration or disk do not fit together.
    """
    config = mol_config(parent, recipe.upcycle)
    if calibration is None and not is_copy(config, recipe.upcycle):
        raise MolError(
            "there is no calibration to fit the thin blocks to",
            allowed="a folder that `molcli calibrate` wrote",
            hint=f"molcli calibrate {parent.name} OUT",
        )
    text = None if calibration is None else open_calibration(calibration, parent)
    embedding = parent.embedding()
    size = count_parameters(config).total * embedding.element_size()
    start = time.monotonic()
    with output_folder(out, need_bytes=size) as staging:
        writer = ShardedWriter(staging)
        config.dtype = embedding.dtype
        costs: dict[int, float] = {}
        auto = recipe.upcycle.gated_deltanet == "auto" and config.num_routed_blocks > 0
        if auto and text is not None:
            costs = deltanet_costs(parent, config, text, recipe, progress)
            for i in cheapest(costs, recipe.upcycle.gated_deltanet_budget):
                config.layer_kinds[i] = "gated_deltanet"
        measured = _convert(parent, config, text, recipe, writer, progress)
        writer.close()
        for i, cost in costs.items():
            measured.layers[i]["gated_deltanet_kl"] = cost
        config.architectures = ["MoLForCausalLM"]
        config.save_pretrained(staging)
        parent.copy_tokenizer(staging)
        save_recipe(recipe, staging / RECIPE_FILE)
        samples = None
        if text is not None and recipe.upcycle.receipt == "full":
            samples = continuations(staging, parent, text.heldout)
        seconds = time.monotonic() - start
        found = receipt(parent, config, recipe, text, measured, samples, seconds)
        (staging / "receipt.json").write_text(json.dumps(found, indent=2) + "\n")
        (staging / "receipt.html").write_text(receipt_page(found), encoding="utf-8")


@torch.no_grad()
def _convert(
    parent: Parent,
    config: MoLConfig,
    text: Calibration | None,
    recipe: Recipe,
    writer: ShardedWriter,
    progress: Progress,
) -> Measured:
    """Writes every tensor, and measures as much as the recipe asks for."""
    device = default_device()
    embedding = parent.embedding()
    dtype = embedding.dtype
    writer.add("model.embed_tokens.weight", embedding)
    streams = comparison = None
    if text is not None:
        fit, heldout = (
            open_streams(rows, config, embedding, device) for rows in (text.fit, text.heldout)
        )
        streams = fit, heldout
        if recipe.upcycle.receipt == "full":
            comparison = Comparison(parent, config, text.heldout, heldout, recipe.calibrate.seed)
    generator = torch.Generator().manual_seed(recipe.calibrate.seed)
    report = []
    for i in range(config.num_hidden_layers):
        dense = dense_layer(parent, config, i, device)
        fitted = _layer(i, config, dense, text, streams, recipe, generator)
        layer: DenseLayer | MoLLayer = dense if fitted is None else fitted.layer
        row: dict[str, Any] = {"layer": i, "kind": config.layer_kinds[i]}
        if fitted is not None:
            row["retained_energy"] = fitted.retained
        if text is not None and streams is not None:
            source, before = _source(i, config, dense, text, streams[0]), streams[1].parent
            row |= advance(*streams, dense, layer)
            if comparison is not None:
                comparison.advance(source, layer, before, streams[0].parent)
        report.append(row)
        for name, tensor in layer.state_dict().items():
            writer.add(f"model.layers.{i}.{name}", tensor.to(stored_dtype(name, dtype)))
        progress(i + 1, config.num_hidden_layers)
    norm, head = parent.final_norm(), parent.lm_head()
    writer.add("model.norm.weight", norm)
    if head is not None:
        writer.add("lm_head.weight", head)
    if streams is None:
        return Measured(report)
    ending = open_ending(parent, device)
    losses = ending.figures(streams[1], streams[1].student)
    if comparison is None:
        return Measured(report, losses)
    progress(config.num_hidden_layers, config.num_hidden_layers, "comparing with baselines")
    for index, kl in comparison.sensitivity.figures(ending).items():
        report[index]["sensitivity"] = kl
    return Measured(report, losses, comparison.figures(ending))


def _layer(
    index: int,
    config: MoLConfig,
    dense: DenseLayer,
    text: Calibration | None,
    streams: tuple[Streams, Streams] | None,
    recipe: Recipe,
    generator: torch.Generator,
) -> FittedLayer | None:
    """The converted layer, None where the parent's is kept."""
    if config.layer_kinds[index] == "dense":
        return None
    if is_copy(config, recipe.upcycle):
        return copy_layer(config, index, dense)
    assert text is not None and streams is not None
    fit = streams[0]
    if recipe.upcycle.method != "fitted":
        source = _source(index, config, dense, text, fit)
        return baseline_layer(recipe.upcycle.method, config, source, recipe.calibrate.seed)
    return fit_layer(
        config,
        index,
        parts(config),
        Teacher(dense, fit.parent, fit.context),
        fit.student,
        text.moment(index).to(fit.parent.device),
        fit.context,
        recipe.upcycle,
        generator,
    )


def _source(
    index: int, config: MoLConfig, dense: DenseLayer, text: Calibration, fit: Streams
) -> ParentLayer:
    return ParentLayer(index, dense, parts(config), fit.parent, fit.context, text)
