"""Calibrate: run text through the parent, layer by layer, and save the statistics for upcycling.

Writes a folder: `tokens.safetensors` (packed rows to fit on and rows held out), a file per layer
with the float64 second moments of the residual that attention and FFN read, and `calibration.json`,
which has the sha256 of each of these files and of itself.
"""

from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from molcli.config.sections import CalibrateConfig, SampleConfig
from molcli.data.checked import write_index
from molcli.data.packing import TokenRows
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.files.checksums import file_sha256
from molcli.files.folders import output_folder
from molcli.files.resumable import ResumableWork
from molcli.files.tensors import save_tensors
from molcli.fitting.calibration import INDEX, TOKENS, moments_file, split_text, text_hash
from molcli.fitting.chunks import chunk_text
from molcli.maths.moments import second_moment, unit_rms
from molcli.model.checkpoint import default_device
from molcli.model.configuration_mol import MoLConfig
from molcli.model.parent import dense_layer
from molcli.progress import Progress, silent


@torch.no_grad()
def calibrate(
    parent: Parent,
    config: CalibrateConfig,
    out: Path,
    progress: Progress = silent,
    *,
    sampled: SampleConfig | None = None,
) -> None:
    """Write a calibration folder. The parent is read one layer at a time.

    Resumes where an earlier call for the same folder, parent and text was killed, from the layers
    that it had saved.

    Args:
        parent: a dense model.
        config: the text, and how many tokens of it.
        out: the folder to write.
        progress: called after each layer.
        sampled: how `config.data` was sampled from the parent; it is recorded in place of the
            file, which is a temporary one.

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
        sums = _save_moments(parent, fit, unfinished, progress)
        tokens = {
            f"{name}.{field}": getattr(rows, field).contiguous()
            for name, rows in (("fit", fit), ("heldout", heldout))
            for field in ("input_ids", "document_ids", "lengths")
        }
        save_tensors(tokens, staging / TOKENS)
        recorded = asdict(config)
        if sampled is not None:
            recorded["data"] = None
        about = {
            "parent": of_parent,
            "data": of_text,
            "tokens": fit.tokens,
            "heldout_tokens": heldout.tokens,
            "config": recorded,
            "sampled": None if sampled is None else asdict(sampled),
            "files": {TOKENS: file_sha256(staging / TOKENS)} | sums,
        }
        write_index(staging / INDEX, about)
        for layer in range(parent.config.num_hidden_layers):
            moments_file(unfinished.folder, layer).rename(moments_file(staging, layer))
        unfinished.remove()  # before the output appears: no later run would remove it


def _save_moments(
    parent: Parent, fit: TokenRows, unfinished: ResumableWork, progress: Progress
) -> dict[str, str]:
    """Save every layer's second moments in the folder of unfinished work.

    All of them in memory would take more than two layers of a large parent.

    Returns:
        The files' sha256 sums, by name.
    """
    model = MoLConfig(**parent.mol_config_kwargs())
    device, count = default_device(), model.num_hidden_layers
    embedding = parent.embedding()
    x = F.embedding(fit.input_ids.flatten().long(), embedding).to(device, torch.float32)
    x *= model.embedding_scale
    del embedding
    chunks = chunk_text(model, fit, device)
    done, saved = unfinished.load() or (0, {})
    if saved:
        x.copy_(saved["x"])
    del saved
    files = [moments_file(unfinished.folder, i) for i in range(count)]
    written = {file.name: file_sha256(file) for file in files[:done]}
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
        if not all(bool(moment.any()) for moment in moments.values()):
            raise MolError(
                f"the parent's activations at layer {i} are all zero",
                allowed="a parent and a text with an embedding that is not zero",
                hint="other text, or download the parent's weights again",
            )
        save_tensors(moments, files[i])
        written[files[i].name] = file_sha256(files[i])
        unfinished.save_if_due(i + 1, {"x": x}, written)
        progress(i + 1, count)
    return written
