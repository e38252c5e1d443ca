"""The output folder of a run: checked before it, and filled with the trained model after it."""

import shutil
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import GenerationConfig

from molcli.config.recipe import RECIPE_FILE, save_recipe
from molcli.config.sections import Recipe
from molcli.data.tokenizer import open_tokenizer
from molcli.errors import MolError
from molcli.files.generation_config import read_generation, write_generation
from molcli.files.tensors import ShardedWriter, TensorReader
from molcli.files.writable import check_writable
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import open_config
from molcli.stages.train.distributed import first_error, full_tensor

_CONFIG = "config.json"
RECEIPT = "receipt.json"  # written by `upcycle` beside a converted model
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def check_output(out: Path, *, resume: bool) -> None:
    """Check that `out` is free for this run, or holds the run to resume.

    Raises:
        MolError: if not.
    """
    if (out / _CONFIG).is_file():
        raise MolError(f"{out} holds a finished model", hint="another output folder")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not resume):
        raise MolError(
            f"{out} exists and is not empty",
            allowed="a path that does not exist yet, or --resume to continue the run in it",
        )
    check_writable(out)
    if resume and not out.is_dir():
        raise MolError(f"there is no run to resume in {out}", hint="the command without --resume")


def save_model(
    model: MoLForCausalLM, checkpoint: Path, recipe: Recipe, out: Path, accelerator: Accelerator
) -> None:
    """Write the trained model into `out`, `config.json` last. Collective; the main rank writes.

    Args:
        model: its tensors are cast to their dtypes in `checkpoint`; in one process the model itself
            is changed.
        checkpoint: the model that the run began with; its tokenizer,
            generation_config.json and receipt are copied.
        recipe: of the run, saved beside the weights.
        out: folder of the run.
        accelerator: gives ranks.

    Raises:
        MolError: on all ranks, if the disk is full.
    """
    dtypes = {name: _DTYPES[info.dtype] for name, info in TensorReader(checkpoint).tensors.items()}
    staging, found = out / ".final", ""
    try:
        if accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
        if accelerator.num_processes == 1:
            _write_unsharded(model, dtypes, staging)
        else:
            found = _write_sharded(model, dtypes, staging, main=accelerator.is_main_process)
        if accelerator.is_main_process and not found:
            _write_small_files(checkpoint, recipe, staging)
    except (OSError, SafetensorError) as error:
        found = str(error)
    if found := first_error(found, accelerator):
        shutil.rmtree(staging, ignore_errors=True)
        raise MolError(
            f"the trained model could not be written to {out}: {found}",
            allowed="room for all of the model",
            hint="free some space, then the same command with --resume",
        )
    if accelerator.is_main_process:
        for file in sorted(staging.iterdir(), key=lambda file: file.name == _CONFIG):
            file.replace(out / file.name)
        staging.rmdir()


def _write_unsharded(model: MoLForCausalLM, dtypes: dict[str, torch.dtype], folder: Path) -> None:
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])
    model.generation_config = GenerationConfig()  # the checkpoint's own is copied
    model.save_pretrained(folder)


def _write_sharded(
    model: MoLForCausalLM, dtypes: dict[str, torch.dtype], folder: Path, *, main: bool
) -> str:
    """Gather and write one tensor at a time. Returns the main rank's error message, or ""."""
    writer, found = ShardedWriter(folder), ""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name not in dtypes:
            continue
        tensor = full_tensor(tensor.detach())
        try:
            if main and not found:
                writer.add(name, tensor.to(dtypes[name]))
        except (OSError, SafetensorError) as error:
            found = str(error)  # continue: other ranks wait for the next tensor
    if main and not found:
        writer.close()
        model.config.dtype = dtypes[next(iter(dtypes))]
        model.config.architectures = [MoLForCausalLM.__name__]
        model.config.save_pretrained(folder)
    return found


def _write_small_files(checkpoint: Path, recipe: Recipe, folder: Path) -> None:
    write_generation(read_generation(checkpoint, open_config(checkpoint)), folder)
    tokenizer = open_tokenizer(checkpoint)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if (checkpoint / RECEIPT).is_file():
        shutil.copy(checkpoint / RECEIPT, folder)
    save_recipe(recipe, folder / RECIPE_FILE)
