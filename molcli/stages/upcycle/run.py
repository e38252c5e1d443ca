"""The conversion, layer after layer."""

import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from molcli import __version__
from molcli.config.recipe import RECIPE_FILE, save_recipe
from molcli.config.sections import Recipe
from molcli.errors import MolError
from molcli.io.folder import output_folder
from molcli.io.parent import Parent
from molcli.io.tensors import ShardedWriter
from molcli.maths.parameters import count_parameters
from molcli.model.checkpoint import default_device
from molcli.model.configuration_mol import MoLConfig
from molcli.model.from_parent import dense_layer
from molcli.model.layers import DenseLayer, MoLLayer
from molcli.progress import Progress, silent
from molcli.stages.upcycle.calibration import Calibration, open_calibration
from molcli.stages.upcycle.layer import FittedLayer, copy_layer, fit_layer
from molcli.stages.upcycle.shape import is_whole, mol_config, parts
from molcli.stages.upcycle.streams import Streams, open_streams, relative_error
from molcli.stages.upcycle.teacher import Teacher

# `gated_deltanet: auto` takes Gated DeltaNet where it leaves at most this much more error.
AUTO_TOLERANCE = 1.05
KEPT_IN_FP32 = ("A_log", "dt_bias", "router.weight", "router.correction_bias")


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
    if calibration is None and not is_whole(config):
        raise MolError(
            "there is no calibration to fit the thin blocks to",
            allowed="a folder that `molcli calibrate` wrote",
            hint=f"molcli calibrate {parent.name} OUT",
        )
    text = None if calibration is None else open_calibration(calibration, parent)
    embedding = parent.embedding()
    count = count_parameters(config)
    start = time.monotonic()
    with output_folder(out, need_bytes=count.total * embedding.element_size()) as staging:
        writer = ShardedWriter(staging)
        config.dtype = embedding.dtype
        layers, heldout = _convert(parent, config, text, recipe, writer, progress)
        writer.close()
        config.architectures = ["MoLForCausalLM"]
        config.save_pretrained(staging)
        parent.copy_tokenizer(staging)
        save_recipe(recipe, staging / RECIPE_FILE)
        receipt = {
            "parent": {"name": parent.name, "fingerprint": parent.fingerprint()},
            "calibration": None if text is None else text.about,
            "parameters": {"total": count.total, "active": count.active},
            "heldout": heldout,
            "layers": layers,
            "seconds": round(time.monotonic() - start, 1),
            "versions": {
                "molcli": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        (staging / "receipt.json").write_text(json.dumps(receipt, indent=2) + "\n")


@torch.no_grad()
def _convert(
    parent: Parent,
    config: MoLConfig,
    text: Calibration | None,
    recipe: Recipe,
    writer: ShardedWriter,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, float] | None]:
    """Writes every tensor. Returns the receipt's rows for layers, and its held-out losses."""
    device = default_device()
    embedding = parent.embedding()
    dtype = embedding.dtype
    writer.add("model.embed_tokens.weight", embedding)
    streams = (
        None
        if text is None
        else (
            open_streams(text.fit, config, embedding, device),
            open_streams(text.heldout, config, embedding, device),
        )
    )
    generator = torch.Generator().manual_seed(recipe.calibrate.seed)
    report = []
    for i in range(config.num_hidden_layers):
        dense = dense_layer(parent, config, i, device)
        fitted = _layer(i, config, dense, text, streams, recipe, generator)
        layer: DenseLayer | MoLLayer = dense if fitted is None else fitted.layer
        row: dict[str, Any] = {"layer": i, "kind": config.layer_kinds[i]}
        if fitted is not None:
            row["retained_energy"] = fitted.retained
        if streams is not None:
            row |= _advance(streams, dense, layer)
        report.append(row)
        for name, tensor in layer.state_dict().items():
            wanted = torch.float32 if name.endswith(KEPT_IN_FP32) else dtype
            writer.add(f"model.layers.{i}.{name}", tensor.to(wanted))
        progress(i + 1, config.num_hidden_layers)
    norm, head = parent.final_norm(), parent.lm_head()
    writer.add("model.norm.weight", norm)
    if head is not None:
        writer.add("lm_head.weight", head)
    if streams is None:
        return report, None
    weight = (embedding if head is None else head).to(device, torch.float32)
    losses = streams[1].losses(norm.to(device, torch.float32), weight, config.rms_norm_eps)
    tokens = int(losses.count)
    return report, {
        "tokens": tokens,
        "parent_ce": losses.parent_cross_entropy.item() / tokens,
        "ce": losses.cross_entropy.item() / tokens,
        "kl": losses.kl.item() / tokens,
    }


def _layer(
    index: int,
    config: MoLConfig,
    dense: DenseLayer,
    text: Calibration | None,
    streams: tuple[Streams, Streams] | None,
    recipe: Recipe,
    generator: torch.Generator,
) -> FittedLayer | None:
    """The converted layer, None where the parent's is kept. Decides `gated_deltanet: auto`."""
    if config.layer_kinds[index] == "dense":
        return None
    if is_whole(config):
        return copy_layer(config, index, dense)
    assert text is not None and streams is not None
    fit = streams[0]
    teacher = Teacher(dense, fit.parent, fit.context)
    moment = text.moment(index).to(fit.parent.device)
    state = generator.get_state()

    def fitted(kind: str) -> FittedLayer:
        config.layer_kinds[index] = kind
        generator.set_state(state)  # both mixers get the same clusters
        return fit_layer(
            config,
            index,
            parts(config),
            teacher,
            fit.student,
            moment,
            fit.context,
            recipe.upcycle,
            generator,
        )

    softmax = fitted(config.layer_kinds[index])
    if recipe.upcycle.gated_deltanet != "auto" or not config.num_routed_blocks:
        return softmax
    deltanet = fitted("gated_deltanet")
    errors = [
        relative_error(fit.context.run(x.layer, fit.student), teacher.output)
        for x in (softmax, deltanet)
    ]
    if errors[1] <= AUTO_TOLERANCE * errors[0]:
        return deltanet
    config.layer_kinds[index] = "softmax"
    return softmax


def _advance(
    streams: tuple[Streams, Streams], dense: DenseLayer, layer: DenseLayer | MoLLayer
) -> dict[str, float]:
    """Moves all residuals past the layer; the receipt's figures for it.

    delta_error: of what the layer adds, against the parent's, on held-out tokens: 0 is exact, 1 is
    what leaving the layer out costs. residual_error: of the residual after it.
    """
    fit, heldout = streams
    before_parent, before_student = heldout.parent, heldout.student
    fit.advance(dense, layer)
    heldout.advance(dense, layer)
    delta = relative_error(heldout.student - before_student, heldout.parent - before_parent)
    return {
        "delta_error": delta,
        "residual_error": heldout.error(),
        "residual_error_fit": fit.error(),
    }
