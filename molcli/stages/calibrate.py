"""Calibrate: run text through the parent, layer by layer, and save the statistics for upcycling.

Writes a folder: `tokens.safetensors` (packed rows to fit on and rows held out), a file per layer
with the float64 second moments of the residual that attention and FFN read, and `calibration.json`.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from molcli.config.sections import CalibrateConfig
from molcli.data.packing import TokenRows
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.files.folders import output_folder
from molcli.files.resumable import ResumableWork
from molcli.files.tensors import save_tensors
from molcli.fitting.calibration import moments_file, split_text, text_hash
from molcli.fitting.chunks import chunk_text
from molcli.maths.moments import second_moment, unit_rms
from molcli.model.checkpoint import default_device
from molcli.model.configuration_mol import MoLConfig
from molcli.model.parent import dense_layer
from molcli.progress import Progress, silent


@torch.no_grad()
def calibrate(
    parent: Parent, config: CalibrateConfig, out: Path, progress: Progress = silent
) -> None:
    """Write a calibration folder. The parent is read one layer at a time.

    Resumes where an earlier call for the same folder, parent and text was killed, from the layers
    that it had saved.

    Args:
        parent: a dense model.
        config: the text, and how many tokens of it.
        out: the folder to write.
        progress: called after each layer.

    Raises:
        MolError: if there is no text, too little for one row to fit on and one held out, no
        token to predict in the latter, or if the parent overflows on it.
    """
    parent.check_context(config.context_length, "calibrate.context_length")
    parent.check_weights()
    fit, heldout = split_text(config, parent.tokenizer(), parent.config.vocab_size)
    of_parent, of_text = parent.fingerprint(), text_hash(fit, heldout)
    unfinished = ResumableWork(out, f"{of_parent} {of_text}")
    with output_folder(out) as staging, unfinished.remove_if_useless():
        _save_moments(parent, fit, unfinished, progress)
        tokens = {
            f"{name}.{field}": getattr(rows, field).contiguous()
            for name, rows in (("fit", fit), ("heldout", heldout))
            for field in ("input_ids", "document_ids", "lengths")
        }
        save_tensors(tokens, staging / "tokens.safetensors")
        about = {
            "parent": of_parent,
            "data": of_text,
            "tokens": fit.tokens,
            "heldout_tokens": heldout.tokens,
            "config": asdict(config),
        }
        (staging / "calibration.json").write_text(json.dumps(about, indent=2) + "\n")
        for layer in range(parent.config.num_hidden_layers):
            moments_file(unfinished.folder, layer).rename(moments_file(staging, layer))
        unfinished.remove()  # before the output appears: no later run would remove it


def _save_moments(
    parent: Parent, fit: TokenRows, unfinished: ResumableWork, progress: Progress
) -> None:
    """Save every layer's second moments in the folder of unfinished work.

    All of them in memory would take more than two layers of a large parent.
    """
    model = MoLConfig(**parent.mol_config_kwargs())
    device, count = default_device(), model.num_hidden_layers
    embedding = parent.embedding()
    x = F.embedding(fit.input_ids.flatten().long(), embedding).to(device, torch.float32)
    x *= model.embedding_scale
    del embedding
    chunks = chunk_text(model, fit, device)
    done, saved = unfinished.load() or (0, {})
    if all(moments_file(unfinished.folder, i).is_file() for i in range(done)) and saved:
        x.copy_(saved["x"])
    else:
        done = 0
    del saved
    for i in range(done, count):
        layer = dense_layer(parent, model, i, device)
        sums = {
            name: torch.zeros(2 * [model.hidden_size], dtype=torch.float64, device=device)
            for name in ("attention", "mlp")
        }
        for chunk in chunks:
            context, before = chunk.context, x[chunk.tokens]
            rows, block = context.dense_rows, layer.block
            sums["attention"] += second_moment(unit_rms(before))
            middle = before + block.mix(before, context.blocks(rows))
            sums["mlp"] += second_moment(unit_rms(middle))
            x[chunk.tokens] = middle + block.feed(middle, rows)
        moments = {name: total.div_(fit.tokens).cpu() for name, total in sums.items()}
        if not all(bool(moment.isfinite().all()) for moment in moments.values()):
            raise MolError(
                f"the parent's activations at layer {i} are not finite",
                allowed="a parent that computes numbers on this text",
                hint="download its weights again",
            )
        save_tensors(moments, moments_file(unfinished.folder, i))
        unfinished.save_if_due(i + 1, {"x": x})
        progress(i + 1, count)
