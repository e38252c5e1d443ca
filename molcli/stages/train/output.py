"""The folder of a training run: what it may find there, and the model that it leaves."""

import shutil
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError

from molcli.config.recipe import RECIPE_FILE, save_recipe
from molcli.config.sections import Recipe
from molcli.errors import MolError
from molcli.io.tensors import TensorReader
from molcli.io.tokenizer import open_tokenizer
from molcli.model import MoLForCausalLM

_CONFIG = "config.json"
RECEIPT = "receipt.json"  # what `upcycle` leaves beside a converted model
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def refuse_folder(out: Path, *, resume: bool) -> None:
    """Raises MolError if `out` holds something that this run would mix with."""
    if (out / _CONFIG).is_file():
        raise MolError(f"{out} holds a finished model", hint="another output folder")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not resume):
        raise MolError(
            f"{out} exists and is not empty",
            allowed="a path that does not exist yet, or --resume to go on with the run in it",
        )
    if resume and not out.is_dir():
        raise MolError(f"there is no run to resume in {out}", hint="the command without --resume")


def save_model(model: MoLForCausalLM, checkpoint: Path, recipe: Recipe, out: Path) -> None:
    """Writes the trained model into `out`, as the run's last act; `config.json` comes last.

    Each tensor is cast to the dtype that it has in `checkpoint`, the model that the run began
    with, whose tokenizer and receipt are copied. Raises MolError if the disk does not take it.
    """
    dtypes = {name: _DTYPES[info.dtype] for name, info in TensorReader(checkpoint).tensors.items()}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])
    staging = out / ".final"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        model.save_pretrained(staging)
        tokenizer = open_tokenizer(checkpoint)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if (checkpoint / RECEIPT).is_file():
            shutil.copy(checkpoint / RECEIPT, staging)
        save_recipe(recipe, staging / RECIPE_FILE)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise MolError(
            f"the trained model could not be written to {out}: {error}",
            allowed="room for the whole model",
            hint="free some space, then the same command with --resume",
        ) from error
    for file in sorted(staging.iterdir(), key=lambda file: file.name == _CONFIG):
        file.replace(out / file.name)
    staging.rmdir()
