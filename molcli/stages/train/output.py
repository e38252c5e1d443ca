"""The output folder of a run: checked before it, and filled with the trained model after it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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
from molcli.files.hidden_folders import (
    clear_hidden,
    hidden_content,
    locked,
    make_hidden,
    refuse_foreign,
    remove_hidden,
    remove_leftover,
)
from molcli.files.json_files import write_object
from molcli.files.receipts import RECEIPT, read_receipt
from molcli.files.tensors import ShardedWriter, TensorReader
from molcli.files.writable import check_writable
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import open_config, save_checkpoint
from molcli.stages.train.distributed import first_error, full_tensor, local_shard
from molcli.stages.train.log_file import LOG, PAGE

_CONFIG = "config.json"
_STAGING = ".final"  # in the output folder, until the trained model is complete
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
    staging = out / _STAGING
    if (out / _CONFIG).is_file():
        remove_leftover(staging)  # of a run that was killed after its last step
        raise MolError(f"{out} holds a finished model", hint="another output folder")
    if resume and not out.is_dir():
        raise MolError(f"there is no run to resume in {out}", hint="the command without --resume")
    taken = os.path.lexists(out) and not out.is_dir()
    if taken or (out.is_dir() and any(out.iterdir()) and not resume):
        raise MolError(
            f"{out} exists and is not empty",
            allowed="a path that does not exist yet, or --resume to continue the run in it",
        )
    check_writable(out)
    refuse_foreign(staging)
    for path in (out / LOG, out / PAGE):
        if path.exists() and not path.is_file():
            raise MolError(
                f"{path} is not a regular file",
                allowed="a file, as a run writes it",
                hint=f"move {path} elsewhere",
            )
        if path.is_symlink() and not path.exists():  # one to a file of the user is followed
            raise MolError(
                f"{path} is a link to {path.readlink()}, which is no file",
                allowed="a file, or a link to one",
                hint=f"remove {path}",
            )


@contextmanager
def run_folder(out: Path, accelerator: Accelerator, *, resume: bool) -> Iterator[None]:
    """Hold the folder of a run: no other run writes it. All ranks call this.

    `out` exists inside the context. A new folder into which nothing was written is removed at the
    end.

    Raises:
        MolError: on all ranks, as `check_output`, if another run holds the folder, or if it cannot
            be made.
    """
    check_output(out, resume=resume)
    accelerator.wait_for_everyone()  # no rank makes the folder before all have looked
    with ExitStack() as stack:
        error: MolError | None = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(_held(out, resume=resume))
            except MolError as found:
                error = found
            except OSError as found:
                error = MolError(
                    f"{out} cannot be written: {found.strerror or found}",
                    allowed="a folder in which this user may write",
                    hint="another output folder",
                )
        if message := first_error("" if error is None else error.found, accelerator):
            raise error or MolError(message)
        yield


@contextmanager
def _held(out: Path, *, resume: bool) -> Iterator[None]:
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out, out):
            check_output(out, resume=resume)  # another run may have ended since
            yield
    finally:
        if is_new:
            with suppress(OSError):  # it is not empty
                out.rmdir()


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
        MolError: on all ranks, if the disk is full, or if a weight is too large for its dtype.
    """
    dtypes = {name: _DTYPES[info.dtype] for name, info in TensorReader(checkpoint).tensors.items()}
    _refuse_overflow(model, dtypes, accelerator)
    staging, found = out / _STAGING, ""
    try:
        if accelerator.is_main_process:
            make_hidden(staging)
            clear_hidden(staging)
        if accelerator.num_processes == 1:
            _write_unsharded(model, dtypes, staging)
        else:
            found = _write_sharded(model, dtypes, staging, main=accelerator.is_main_process)
        if accelerator.is_main_process and not found:
            _write_small_files(checkpoint, recipe, staging)
    except (OSError, SafetensorError) as error:
        found = str(error)
    except BaseException:
        if accelerator.is_main_process:
            remove_leftover(staging)
        raise
    if found := first_error(found, accelerator):
        if accelerator.is_main_process:
            remove_leftover(staging)
        raise MolError(
            f"the trained model could not be written to {out}: {found}",
            allowed="room for all of the model",
            hint="free some space, then the same command with --resume",
        )
    if accelerator.is_main_process:
        _publish(staging, out)


def _publish(staging: Path, out: Path) -> None:
    """Move the files into `out`, last config.json, which says that all is there."""
    for file in hidden_content(staging):
        if file.name != _CONFIG:
            file.replace(out / file.name)
    (staging / _CONFIG).replace(out / _CONFIG)
    remove_hidden(staging)


def _refuse_overflow(
    model: MoLForCausalLM, dtypes: dict[str, torch.dtype], accelerator: Accelerator
) -> None:
    """Raise MolError on all ranks if a float32 weight would be infinite in its stored dtype."""
    names, overflows = [], []
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        part = local_shard(tensor.detach())
        if name in dtypes and part.numel():
            ends = torch.stack(torch.aminmax(part)).to(dtypes[name])
            names.append(name)
            overflows.append(~ends.isfinite().all())
    found = torch.stack(overflows).tolist() if overflows else []
    bad = next((name for name, is_bad in zip(names, found, strict=True) if is_bad), "")
    if bad := first_error(bad, accelerator):
        dtype = str(dtypes[bad]).removeprefix("torch.")
        raise MolError(
            f"the trained weights {bad} are too large for {dtype}, in which the model is stored",
            allowed="weights that stay finite in their stored dtype",
            hint="another output folder and smaller learning rates",
        )


def _write_unsharded(model: MoLForCausalLM, dtypes: dict[str, torch.dtype], folder: Path) -> None:
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])
    model.generation_config = GenerationConfig()  # the checkpoint's own is copied
    save_checkpoint(model, folder)


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
    if (receipt := read_receipt(checkpoint)) is not None:
        write_object(folder / RECEIPT, receipt)
    save_recipe(recipe, folder / RECIPE_FILE)
