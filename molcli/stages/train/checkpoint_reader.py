"""Load a checkpoint into the state of a run, whichever number of processes wrote it.

A file is not trusted: nothing in it is run, and nothing of another shape, dtype or kind than the
run's own state is taken.
"""

import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from molcli.errors import MolError
from molcli.files.regular import check_regular
from molcli.stages.train.checkpoint_folder import (
    GENERATORS,
    TENSORS,
    Checkpoint,
    check_sums,
    damaged,
)
from molcli.stages.train.distributed import first_error, is_sharded
from molcli.stages.train.nonfinite import first_nonfinite
from molcli.stages.train.parts_index import PartsReader, check_archive
from molcli.stages.train.state import MOMENTS, TrainState, in_words

# CheckpointException is no Exception.
_UNREADABLE = (
    *(OSError, RuntimeError, EOFError, KeyError, ValueError, TypeError, IndexError),
    *(AttributeError, AssertionError, pickle.UnpicklingError, CheckpointException),
)
_MAY_CHANGE = ("params", "lr", "fused")  # in a group of the optimiser, when a run is resumed


def load_checkpoint(
    state: TrainState, checkpoint: Checkpoint, accelerator: Accelerator | None = None
) -> None:
    """Load tensors, random states and counters.

    Args:
        state: of the run, with the optimiser of the checkpoint's stage.
        checkpoint: to resume from.
        accelerator: of several ranks, which all call this; their main one reads the sums.

    Raises:
        MolError: if a file is not as it was written, or does not fit the run, or if a value is not
            finite.
    """
    _check_sums(checkpoint, accelerator)
    folder = checkpoint.folder
    try:
        tensors = _load_tensors(state, folder)
    except _UNREADABLE as error:
        raise damaged(folder, describe(error)) from error
    if name := first_nonfinite(state.existing_tensors(), accelerator):
        raise damaged(folder, f"{in_words(name)} are not finite")
    try:
        torch.set_rng_state(tensors["rng"])
    except (RuntimeError, TypeError) as error:
        raise damaged(folder, f"its random state cannot be used: {error}") from error
    parameter = next(state.model.parameters())
    # Another number of GPUs is no reason to stop: nothing in training draws from their generators.
    if parameter.is_cuda and len(tensors["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(tensors["cuda_rng"])
    state.restore_counters(checkpoint.counters)


def describe(error: BaseException) -> str:
    """Describe an error in words; a CheckpointException holds one for each rank."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split()) or type(error).__name__


def _check_sums(checkpoint: Checkpoint, accelerator: Accelerator | None) -> None:
    found: MolError | None = None
    if accelerator is None or accelerator.is_main_process:
        try:
            check_sums(checkpoint)
        except MolError as error:
            found = error
    message = "" if found is None else found.found
    if accelerator is not None:
        message = first_error(message, accelerator)
    if message:
        raise found or MolError(message)


def _load_tensors(state: TrainState, folder: Path) -> dict[str, Any]:
    """Returns what the checkpoint holds beside weights and moments: random states."""
    single = (folder / TENSORS).is_file()
    path = folder / (TENSORS if single else GENERATORS)
    check_regular(path)
    check_archive(path)
    sharded = is_sharded(next(state.model.parameters()))
    # With several ranks, each reads only its shards.
    tensors: dict[str, Any] = torch.load(path, map_location="cpu", mmap=sharded, weights_only=True)
    _check_random_states(tensors)
    if single:
        _check_weights(tensors["model"], state.model.state_dict())
        _check_optimizer(tensors["optimizer"], state.optimizer)
        state.load_unsharded(tensors)
        return tensors
    own = state.tensors_by_name()
    # In place: these are the parameters, buffers and moments themselves.
    with warnings.catch_warnings():  # that one process reads, which is intended
        warnings.simplefilter("ignore")
        load(own, storage_reader=PartsReader(folder, own))
    return tensors


def _check_random_states(found: Any) -> None:
    if not isinstance(found, dict) or not isinstance(found.get("cuda_rng"), list):
        raise ValueError("it has no random states")
    for generator in (found.get("rng"), *found["cuda_rng"]):
        if not _is_plain(generator) or generator.dtype != torch.uint8 or generator.dim() != 1:
            raise ValueError("its random states are not such")


def _check_weights(found: Any, own: Mapping[str, Tensor]) -> None:
    if not isinstance(found, dict) or found.keys() != own.keys():
        raise ValueError("it holds other weights than the model")
    for name, tensor in own.items():
        _check_like(name, found[name], tensor)


def _check_optimizer(found: Any, optimizer: torch.optim.Optimizer) -> None:
    """Everything that `load_state_dict` would take over as it is."""
    own, parameters = optimizer.state_dict(), []
    for group in optimizer.param_groups:
        parameters += group["params"]
    groups, moments = found["param_groups"], found["state"]
    if len(groups) != len(own["param_groups"]):
        raise ValueError("it has other groups of parameters than the optimiser")
    for saved, ours in zip(groups, own["param_groups"], strict=True):
        changed = [k for k in saved if k not in _MAY_CHANGE and saved[k] != ours.get(k, saved[k])]
        rate, fused = saved["lr"], saved.get("fused")
        plain = type(rate) is float and math.isfinite(rate) and fused in (None, True, False)
        if changed or not plain or saved["params"] != ours["params"]:
            raise ValueError("its optimiser has other settings than the run")
    if not set(moments) <= set(range(len(parameters))):
        raise ValueError("it has moments of parameters that are not trained")
    for number, kept in moments.items():
        if kept.keys() != {"step", *MOMENTS}:
            raise ValueError("its moments are not those of AdamW")
        for name in MOMENTS:
            _check_like(name, kept[name], parameters[number])
        if not _is_plain(kept["step"]) or kept["step"].shape or kept["step"].dtype != torch.float32:
            raise ValueError("its optimiser counts no steps")


def _check_like(name: str, found: Any, own: Tensor) -> None:
    if not _is_plain(found) or found.dtype != own.dtype or found.shape != own.shape:
        raise ValueError(f"{name} has another shape or dtype than the run's")


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with all its numbers in memory."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )
