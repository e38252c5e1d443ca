"""The conversion, layer after layer."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from molcli.config.layer_choice import cheapest
from molcli.config.recipe import RECIPE_FILE, save_recipe
from molcli.config.sections import Recipe
from molcli.errors import MolError
from molcli.estimate.parameters import count_parameters
from molcli.families.parent import Parent
from molcli.files.folders import output_folder
from molcli.files.tensors import ShardedWriter
from molcli.fitting.baselines import ParentLayer, baseline_layer
from molcli.fitting.calibration import Calibration, open_calibration
from molcli.fitting.layer import copy_layer, fit_layer
from molcli.fitting.shapes import is_copy, mol_config, needs_text, parts
from molcli.fitting.streams import Streams, open_output_head, open_streams
from molcli.fitting.without_text import add_layer, convert_without_text
from molcli.model.checkpoint import default_device
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import DenseLayer, MoLLayer
from molcli.model.parent import dense_layer
from molcli.progress import Progress, silent
from molcli.report.receipt import receipt_page
from molcli.stages.upcycle.comparison import Comparison, continuations
from molcli.stages.upcycle.report import Measured, advance, receipt
from molcli.stages.upcycle.selection import deltanet_costs, layer_costs

# A shard that is not yet full waits in memory, beside a layer and the text that it is fitted to:
# small ones, but of a large checkpoint not very many.
SHARD_BYTES, SHARDS = 64 * 2**20, 32


def upcycle(
    parent: Parent,
    calibration: Path | None,
    recipe: Recipe,
    out: Path,
    progress: Progress = silent,
) -> None:
    """Writes a checkpoint with config, tokenizer, generation_config.json, recipe and receipt.

    It appears whole, or not at all.

    calibration: a folder that calibrate wrote; None is enough where `needs_text` is False, and the
    receipt then has no figures of held-out text. The parent is read, and the checkpoint written,
    one layer at a time.
    Raises MolError where recipe, parent, calibration or disk do not fit together.
    """
    config = mol_config(parent, recipe.upcycle)
    if calibration is None and needs_text(config, recipe.upcycle):
        raise MolError(
            "there is no calibration to fit the thin blocks to",
            allowed="a folder that `molcli calibrate` wrote",
            hint=f"molcli calibrate {parent.name} OUT",
        )
    text = None if calibration is None else open_calibration(calibration, parent)
    config.dtype = parent.embedding().dtype
    size = count_parameters(config).total * config.dtype.itemsize
    start = time.monotonic()
    with output_folder(out, need_bytes=size) as staging:
        writer = ShardedWriter(staging, max_shard_bytes=max(SHARD_BYTES, size // SHARDS))
        asked, alone = recipe, dict[int, float]()
        choose = recipe.upcycle.layers == "auto" and needs_text(config, recipe.upcycle)
        if choose and text is not None:
            alone = layer_costs(parent, config, text, recipe, progress)
            layers = sorted(cheapest(alone, recipe.upcycle.layers_budget))
            recipe = replace(recipe, upcycle=replace(recipe.upcycle, layers=layers))
            config = mol_config(parent, recipe.upcycle)
            config.dtype = parent.embedding().dtype
        costs: dict[int, float] = {}
        auto = recipe.upcycle.gated_deltanet == "auto" and config.num_routed_blocks > 0
        if auto and text is not None:
            costs = deltanet_costs(parent, config, text, recipe, progress)
            for i in cheapest(costs, recipe.upcycle.gated_deltanet_budget):
                config.layer_mixers[i] = "gated_deltanet"
        writer.add("model.embed_tokens.weight", parent.embedding())
        if text is None:
            measured = Measured(convert_without_text(parent, config, recipe, writer, progress))
        else:
            measured = _convert(parent, config, text, recipe, writer, progress)
        writer.add("model.norm.weight", parent.final_norm())
        head = parent.lm_head()
        if head is not None:
            writer.add("lm_head.weight", head)
        del head
        writer.close()
        for i, cost in costs.items():
            measured.layers[i]["gated_deltanet_kl"] = cost
        for i, cost in alone.items():
            measured.layers[i]["alone_kl"] = cost
        config.architectures = ["MoLForCausalLM"]
        config.save_pretrained(staging)
        parent.copy_tokenizer(staging)
        parent.copy_generation(staging)
        save_recipe(asked, staging / RECIPE_FILE)
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
    text: Calibration,
    recipe: Recipe,
    writer: ShardedWriter,
    progress: Progress,
) -> Measured:
    """Writes the layers, and measures as much as the recipe asks for."""
    device, embedding = default_device(), parent.embedding()
    streams = (
        open_streams(text.fit, config, embedding, device),
        open_streams(text.heldout, config, embedding, device),
    )
    del embedding  # large, and no more looked at
    comparison = None
    if recipe.upcycle.receipt == "full":
        comparison = Comparison(parent, config, text.heldout, streams[1], recipe.calibrate.seed)
    generator = torch.Generator().manual_seed(recipe.calibrate.seed)
    count, report = config.num_hidden_layers, []
    for i in range(count):
        dense = dense_layer(parent, config, i, device)
        layer, row = _layer(i, config, dense, text, streams, recipe, generator, comparison)
        add_layer(writer, config, i, layer.state_dict())
        report.append({"layer": i, "kind": config.layer_labels[i]} | row)
        del dense, layer  # the next layer needs their room
        progress(i + 1, count)
    heldout = streams[1]
    del streams  # the head needs the room of the text that blocks were fitted to
    ending = open_output_head(parent, device)
    losses = ending.figures(heldout, heldout.student)
    if comparison is None:
        return Measured(report, losses)
    progress(count, count, "comparing with baselines")
    for index, kl in comparison.sensitivity.figures(ending).items():
        report[index]["sensitivity"] = kl
    return Measured(report, losses, comparison.figures(ending))


def _layer(
    index: int,
    config: MoLConfig,
    dense: DenseLayer,
    text: Calibration,
    streams: tuple[Streams, Streams],
    recipe: Recipe,
    generator: torch.Generator,
    comparison: Comparison | None,
) -> tuple[DenseLayer | MoLLayer, dict[str, Any]]:
    """The layer that takes the place of the parent's, and figures of it; moves all residuals."""
    fit, heldout = streams
    share, before, method = parts(config), heldout.parent, recipe.upcycle.method
    source = None
    if comparison is not None:  # the fit moves the residual in place, which baselines start from
        source = ParentLayer(index, dense, share, fit.parent.clone(), text)
    fitted = None
    if not config.is_dense(index):
        if is_copy(config, recipe.upcycle):
            fitted = copy_layer(config, index, dense)
        elif method != "fitted":
            start = source or ParentLayer(index, dense, share, fit.parent, text)
            fitted = baseline_layer(method, config, start, recipe.calibrate.seed)
            del start
        else:
            moment = text.moment(index).to(fit.parent.device)
            fitted = fit_layer(config, index, share, dense, fit, moment, recipe.upcycle, generator)
    layer = dense if fitted is None else fitted.layer
    if fitted is None or method != "fitted" or is_copy(config, recipe.upcycle):
        fit.advance(dense, layer)
    row = {} if fitted is None else {"retained_energy": fitted.retained}
    row |= advance(fit, heldout, dense, layer)
    if comparison is not None and source is not None:
        comparison.advance(source, layer, before, fit.parent)
    return layer, row
