"""Calibrate: run text through the parent, layer by layer, and keep what upcycling fits to.

Writes a folder: `tokens.safetensors` (packed rows to fit on and rows held out), per layer the
float64 second moments of the residual that attention and FFN read, and `calibration.json`.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from molcli.config.sections import CalibrateConfig
from molcli.errors import MolError
from molcli.io.calibration import split_text, text_hash
from molcli.io.folder import output_folder
from molcli.io.parent import Parent
from molcli.io.unfinished import Unfinished
from molcli.maths.moments import second_moment, unit_rms
from molcli.model.checkpoint import default_device
from molcli.model.chunks import chunk_text
from molcli.model.configuration_mol import MoLConfig
from molcli.model.from_parent import dense_layer
from molcli.progress import Progress, silent


@torch.no_grad()
def calibrate(
    parent: Parent, config: CalibrateConfig, out: Path, progress: Progress = silent
) -> None:
    """Fits nothing, only observes. The parent is read one layer at a time. A call goes on from the
    layers that an earlier one for the same folder, parent and text had saved when it was killed.

    Raises MolError if there is no text, too little for one row to fit on and one held out, nothing
    to predict in the latter, or if the parent overflows on it.
    """
    fit, heldout = split_text(config, parent.tokenizer(), parent.config.vocab_size)
    of_parent, of_text = parent.fingerprint(), text_hash(fit, heldout)
    unfinished = Unfinished(out, f"{of_parent} {of_text}")
    model = MoLConfig(**parent.mol_config_kwargs())
    device = default_device()
    embedding = parent.embedding()
    x = F.embedding(fit.input_ids.flatten().long(), embedding).to(device, torch.float32)
    del embedding
    chunks = chunk_text(model, fit, device)
    # One tensor: many of medium size would leave the heap full of holes for what comes next.
    shape = 2, model.hidden_size, model.hidden_size
    of_layers = torch.empty(model.num_hidden_layers, *shape, dtype=torch.float64)
    done, saved = unfinished.load() or (0, {})
    if saved:
        x.copy_(saved["x"])
        of_layers[:done] = saved["moments"]
    del saved
    for i in range(done, model.num_hidden_layers):
        layer = dense_layer(parent, model, i, device)
        both = torch.zeros(shape, dtype=torch.float64, device=device)
        sums = dict(zip(("attention", "mlp"), both, strict=True))
        for chunk in chunks:
            context, before = chunk.context, x[chunk.tokens]
            rows, block = context.dense_rows, layer.block
            sums["attention"] += second_moment(unit_rms(before))
            middle = before + block.mix(before, rows, context.rotary, context.stream, None)
            sums["mlp"] += second_moment(unit_rms(middle))
            x[chunk.tokens] = middle + block.feed(middle, rows)
        of_layers[i] = both.div_(fit.tokens)
        if not both.isfinite().all():
            raise MolError(
                f"the parent's activations at layer {i} are not finite",
                allowed="a parent that computes numbers on this text",
                hint="download its weights again",
            )
        unfinished.save(i + 1, {"x": x, "moments": of_layers[: i + 1]})
        progress(i + 1, model.num_hidden_layers)
    with output_folder(out) as staging:
        tokens = {
            f"{name}.{field}": getattr(rows, field).contiguous()
            for name, rows in (("fit", fit), ("heldout", heldout))
            for field in ("input_ids", "document_ids", "lengths")
        }
        save_file(tokens, staging / "tokens.safetensors")
        moments = {
            f"layers.{i}.{name}": own
            for i, both in enumerate(of_layers)
            for name, own in zip(("attention", "mlp"), both, strict=True)
        }
        save_file(moments, staging / "moments.safetensors")
        about = {
            "parent": of_parent,
            "data": of_text,
            "tokens": fit.tokens,
            "heldout_tokens": heldout.tokens,
            "config": asdict(config),
        }
        (staging / "calibration.json").write_text(json.dumps(about, indent=2) + "\n")
    unfinished.clear()
