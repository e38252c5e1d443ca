"""Convert a dense parent, layer after layer, and write the checkpoint with its receipt.

Inputs: the parent, a calibration unless no block is fitted, and the recipe. Output: a folder with
shards, config, tokenizer, recipe and receipt. The parent is read, and the shards are written, one
layer at a time.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molcli.config.recipe import RECIPE_FILE, save_recipe
from molcli.config.sections import Recipe
from molcli.errors import MolError
from molcli.estimate.parameters import count_parameters
from molcli.families.parent import Parent
from molcli.files.finite import cast
from molcli.files.folders import output_folder
from molcli.files.json_files import write_object
from molcli.files.tensors import ShardedWriter
from molcli.fitting.baselines import BaselineInputs, baseline_layer
from molcli.fitting.calibration import Calibration, open_calibration
from molcli.fitting.converted_config import is_copy, mol_config, needs_text
from molcli.fitting.layer import FittedLayer, copied_tensors, copy_layer, fit_layer
from molcli.fitting.partition import block_parts
from molcli.fitting.residuals import Residuals, open_output_head, open_residuals
from molcli.fitting.slices import fit_sliced_layer
from molcli.model.checkpoint import default_device, stored_dtype
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import DenseLayer, Layer, SkippedLayer
from molcli.model.parent import dense_layer
from molcli.progress import Progress, silent, step
from molcli.report.receipt import receipt_page
from molcli.stages.upcycle.comparison import Comparison, continuations
from molcli.stages.upcycle.receipt import Measured, layer_figures, make_receipt
from molcli.stages.upcycle.selection import select_layers

# A shard that is not yet full stays in memory, beside a layer and the text that it is fitted to:
# shards are small, but a large checkpoint should not have very many.
SHARD_BYTES, SHARDS = 64 * 2**20, 32
# Rows of the embedding, evenly spread over the vocabulary, that routers are set by without text.
EMBEDDINGS = 2048


def upcycle(
    parent: Parent,
    calibration: Path | None,
    recipe: Recipe,
    out: Path,
    progress: Progress = silent,
) -> None:
    """Convert a parent and write the checkpoint; complete, or not at all.

    Args:
        parent: a dense model.
        calibration: a folder that calibrate wrote. None is allowed where `needs_text` is False;
            the receipt then has no figures of held-out text.
        recipe: `upcycle` and `calibrate.seed` are used. What is saved has the other values of
            `calibrate` from the calibration.
        out: the folder to write.
        progress: called after each layer.

    Raises:
        MolError: where recipe, parent, calibration or disk do not fit together.
    """
    config = mol_config(parent, recipe.upcycle)
    if calibration is None and needs_text(config, recipe.upcycle):
        raise MolError(
            "there is no calibration to fit the thin blocks to",
            allowed="a folder that `molcli calibrate` wrote",
            hint=f"molcli calibrate {parent.name} OUT",
        )
    text = None if calibration is None else open_calibration(calibration, parent)
    parent.check_weights()
    config.dtype = parent.dtype
    size = count_parameters(config).total * config.dtype.itemsize
    start = time.monotonic()
    with output_folder(out, need_bytes=size) as staging:
        writer = ShardedWriter(staging, max_shard_bytes=max(SHARD_BYTES, size // SHARDS))
        selection = select_layers(parent, config, text, recipe, progress)
        config = selection.config
        _write(writer, config, "model.embed_tokens.weight", parent.embedding())
        if text is None:
            measured = _write_layers_without_text(parent, config, recipe, writer, progress)
        else:
            measured = _write_layers(parent, config, text, recipe, writer, progress)
        _write(writer, config, "model.norm.weight", parent.final_norm())
        head = parent.lm_head()
        if head is not None:
            _write(writer, config, "lm_head.weight", head)
        del head
        writer.close()
        for i, kl in selection.gated_deltanet_kl.items():
            measured.layers[i]["gated_deltanet_kl"] = kl
        for i, kl in selection.alone_kl.items():
            measured.layers[i]["alone_kl"] = kl
        for i, influence in selection.influence.items():
            measured.layers[i]["influence"] = influence
        config.architectures = ["MoLForCausalLM"]
        config.save_pretrained(staging)
        parent.copy_tokenizer(staging)
        parent.copy_generation(staging)
        in_force = recipe if text is None else text.in_force(recipe)
        save_recipe(in_force, staging / RECIPE_FILE)
        samples = None
        if text is not None and recipe.upcycle.receipt == "full":
            with step(progress, "continuing"):
                samples = continuations(staging, parent, text.heldout)
        seconds = time.monotonic() - start
        receipt = make_receipt(parent, config, recipe, text, measured, samples, seconds)
        write_object(staging / "receipt.json", receipt)
        (staging / "receipt.html").write_text(receipt_page(receipt), encoding="utf-8")


@torch.no_grad()
def _write_layers_without_text(
    parent: Parent, config: MoLConfig, recipe: Recipe, writer: ShardedWriter, progress: Progress
) -> Measured:
    """Write layers that are kept, copied or not fitted.

    Of the parent, only layers whose weights are used are read; kept and copied ones keep their
    stored bits.
    """
    device, embedding = default_device(), parent.embedding()
    x = embedding[:: -(-len(embedding) // EMBEDDINGS)].to(device, torch.float32)
    del embedding
    rows = []
    for i in range(config.num_hidden_layers):
        row: dict[str, Any] = {"layer": i, "kind": config.layer_labels[i]}
        if config.is_skipped(i):
            pass
        elif config.is_dense(i):
            _write_layer(writer, config, i, parent.dense_layer(i))
        elif is_copy(config, recipe.upcycle):
            _write_layer(writer, config, i, copied_tensors(parent.dense_layer(i)))
            row["retained_energy"] = [1.0]
        else:
            method = recipe.upcycle.method
            assert method != "fitted"
            dense = None if method == "random" else dense_layer(parent, config, i, device)
            inputs = BaselineInputs(i, dense, block_parts(config), x, None)
            fitted = baseline_layer(method, config, inputs, recipe.calibrate.seed)
            _write_layer(writer, config, i, fitted.layer.state_dict())
            row["retained_energy"] = fitted.retained
            del dense, inputs, fitted  # the next layer needs their memory
        rows.append(row)
        progress(i + 1, config.num_hidden_layers)
    return Measured(rows)


@torch.no_grad()
def _write_layers(
    parent: Parent,
    config: MoLConfig,
    text: Calibration,
    recipe: Recipe,
    writer: ShardedWriter,
    progress: Progress,
) -> Measured:
    """Convert and write all layers, and measure as much as the recipe asks for."""
    device, embedding = default_device(), parent.embedding()
    fit = open_residuals(text.fit, config, embedding, device)
    heldout = open_residuals(text.heldout, config, embedding, device)
    del embedding  # large, and not needed again
    comparison = None
    if recipe.upcycle.receipt == "full":
        comparison = Comparison(parent, config, text.heldout, heldout, recipe.calibrate.seed)
    generator = torch.Generator().manual_seed(recipe.calibrate.seed)
    conversion = _Conversion(config, text, recipe, fit, heldout, generator, comparison)
    count, rows = config.num_hidden_layers, []
    for i in range(count):
        dense = dense_layer(parent, config, i, device)
        layer, figures = conversion.convert_layer(i, dense)
        _write_layer(writer, config, i, layer.state_dict())
        rows.append({"layer": i, "kind": config.layer_labels[i]} | figures)
        del dense, layer  # the next layer needs their memory
        progress(i + 1, count)
    del fit, conversion  # the head needs the memory of the text that blocks were fitted to
    head = open_output_head(parent, device)
    with step(progress, "comparing"):
        losses = head.losses(heldout, heldout.student)
        if comparison is None:
            return Measured(rows, losses)
        for index, kl in comparison.sensitivity.kl_by_layer(head).items():
            rows[index]["sensitivity"] = kl
        return Measured(rows, losses, comparison.figures(head))


@dataclass(frozen=True)
class _Conversion:
    """What converting a layer on text needs, and the residuals that each layer moves."""

    config: MoLConfig
    text: Calibration
    recipe: Recipe
    fit: Residuals
    heldout: Residuals
    generator: torch.Generator
    comparison: Comparison | None

    def convert_layer(self, index: int, dense: DenseLayer) -> tuple[Layer, dict[str, Any]]:
        """Convert one layer, and move all residuals past it.

        Returns:
            The layer that replaces the parent's (`dense` itself where that is kept), and its
            figures for the receipt.
        """
        fit, heldout, before, inputs = self.fit, self.heldout, self.heldout.parent, None
        if self.comparison is not None:
            # A fit changes the residual in place, which baselines start from.
            inputs = self._baseline_inputs(index, dense, fit.parent.clone())
        layer: Layer = dense
        fitted = None
        if self.config.is_skipped(index):
            layer = SkippedLayer(self.config, "attention", index)
        elif not self.config.is_dense(index):
            fitted = self._fill_layer(index, dense, inputs)
            layer = fitted.layer
        if fitted is None or not self._is_fitted:
            fit.advance(dense, layer)  # a fit has moved them already
        figures = {} if fitted is None else {"retained_energy": fitted.retained}
        figures |= layer_figures(fit, heldout, dense, layer)
        if self.comparison is not None and inputs is not None:
            self.comparison.advance(inputs, layer, before, fit.parent)
        return layer, figures

    @property
    def _is_fitted(self) -> bool:
        options = self.recipe.upcycle
        return options.method == "fitted" and not is_copy(self.config, options)

    def _fill_layer(
        self, index: int, dense: DenseLayer, inputs: BaselineInputs | None
    ) -> FittedLayer:
        config, options, fit = self.config, self.recipe.upcycle, self.fit
        if is_copy(config, options):
            return copy_layer(config, index, dense)
        if options.method != "fitted":
            inputs = inputs or self._baseline_inputs(index, dense, fit.parent)
            return baseline_layer(options.method, config, inputs, self.recipe.calibrate.seed)
        if config.has_slices:
            return fit_sliced_layer(config, index, dense, fit, options.ridge, self.generator)
        moment, parts = self.text.moment(index).to(fit.parent.device), block_parts(config)
        return fit_layer(config, index, parts, dense, fit, moment, options, self.generator)

    def _baseline_inputs(self, index: int, dense: DenseLayer, x: Tensor) -> BaselineInputs:
        return BaselineInputs(index, dense, block_parts(self.config), x, self.text)


def _write_layer(
    writer: ShardedWriter, config: MoLConfig, index: int, tensors: Mapping[str, Tensor]
) -> None:
    """Write the tensors of layer `index` in the checkpoint's dtypes."""
    assert isinstance(config.dtype, torch.dtype)
    for name, tensor in tensors.items():
        name = f"model.layers.{index}.{name}"
        writer.add(name, cast(name, tensor, stored_dtype(name, config.dtype)))


def _write(writer: ShardedWriter, config: MoLConfig, name: str, tensor: Tensor) -> None:
    """Write a tensor of the parent in the checkpoint's dtype, or in its own where that is wider."""
    assert isinstance(config.dtype, torch.dtype)
    writer.add(name, cast(name, tensor, torch.promote_types(config.dtype, tensor.dtype)))
