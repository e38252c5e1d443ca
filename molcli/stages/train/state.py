"""Where a run stands, its tensors, and how it survives being stopped."""

import json
import pickle
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.utils._pytree import tree_leaves

from molcli.errors import MolError
from molcli.files.folders import output_folder
from molcli.model import MoLForCausalLM
from molcli.stages.train.distributed import is_shared, like

_MOMENTS = ("exp_avg", "exp_avg_sq")


def tensors_by_name(model: MoLForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All of them, themselves and not copies; what processes share as DTensors.

    Names say what it is and of which parameter, whatever the optimiser's order. Moments that
    there are none of yet are made, as the first step would.
    """
    stored, parameters = model.state_dict(), dict(model.named_parameters())
    once = {*parameters, *(name for name, _ in model.named_buffers())}  # tied weights
    tensors = {f"model.{name}": tensor for name, tensor in stored.items() if name in once}
    names = {parameter: name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = optimizer.state[parameter]
            if not moments:
                device = parameter.device if group["fused"] else "cpu"
                moments["step"] = torch.zeros((), device=device)
                moments |= {name: torch.zeros_like(parameter) for name in _MOMENTS}
            tensors |= {f"{kind}.{names[parameter]}": x for kind, x in moments.items()}
    return tensors


def load_whole(
    model: MoLForCausalLM, optimizer: torch.optim.Optimizer, tensors: dict[str, Any]
) -> None:
    """tensors: the `model` and `optimizer` of one process, of which each rank takes its part."""
    own = model.state_dict()
    model.load_state_dict({name: like(own[name], x) for name, x in tensors["model"].items()})
    moments = tensors["optimizer"]["state"]
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    for number, parameter in enumerate(parameters):
        kept = moments.get(number, {})
        kept |= {name: like(parameter, kept[name]) for name in _MOMENTS if name in kept}
    optimizer.load_state_dict(tensors["optimizer"])


KEPT = 2  # checkpoints: the newest, and the one before it
# One process writes its tensors to _TENSORS. Several write torch.distributed.checkpoint's files,
# and their random generators, which are the same in all, to GENERATORS.
_TENSORS, GENERATORS, PROGRESS = "state.pt", "generators.pt", "progress.json"

_UNREADABLE = (pickle.UnpicklingError, CheckpointException)  # the latter is no Exception


@dataclass
class TrainState:
    """Everything that changes during a run. The learning rate and the data follow from it.

    step: optimiser steps done, skipped ones included. stage: the one at hand, from 0; stage_step:
    steps done in it. row: place in its endless sequence of rows. tokens: seen in training.
    skipped: steps left out because their gradient was not finite; skipped_in_a_row: the newest
    ones. seconds: spent, over all resumptions. loss: of the newest logged window.
    """

    model: MoLForCausalLM
    optimizer: torch.optim.Optimizer
    step: int = 0
    stage: int = 0
    stage_step: int = 0
    row: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    loss: float = float("nan")

    def next_stage(self) -> None:
        """Stands before the first step of the stage after this one."""
        self.stage, self.stage_step, self.row = self.stage + 1, 0, 0


@dataclass(frozen=True)
class Checkpoint:
    """A saved state. counters: the numbers of TrainState. identity: of the run that wrote it."""

    folder: Path
    counters: dict[str, Any]
    identity: dict[str, Any]


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder`, tensors unread; None if there is none."""
    folders = sorted(folder.glob("step-*"))
    if not folders:
        return None
    try:
        progress = json.loads((folders[-1] / PROGRESS).read_text())
        return Checkpoint(folders[-1], progress["state"], progress["identity"])
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folders[-1], error) from error


def save_checkpoint(state: TrainState, folder: Path, identity: dict[str, Any]) -> Path:
    """Writes folder/step-N, whole or not at all, then removes all but the newest KEPT.

    Raises MolError if the disk does not take it; the checkpoints before it are still there.
    """
    path = folder / f"step-{state.step:08d}"
    if path.is_dir():
        return path
    tensors = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        **generators(),
    }
    need = sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
    try:
        with output_folder(path, need_bytes=need) as staging:
            torch.save(tensors, staging / _TENSORS)
            (staging / PROGRESS).write_text(progress_text(state, identity))
    # torch reports a full disk as a RuntimeError of its zip writer.
    except (OSError, RuntimeError, MolError) as error:
        found = error.found if isinstance(error, MolError) else str(error)
        raise not_written(path, found) from error
    remove_old(folder)
    return path


def progress_text(state: TrainState, identity: dict[str, Any]) -> str:
    """The numbers of the state, as a checkpoint has them."""
    counters = {k: v for k, v in vars(state).items() if k not in ("model", "optimizer")}
    return json.dumps({"state": counters, "identity": identity})


def generators() -> dict[str, Any]:
    """The states of the random generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"rng": torch.get_rng_state(), "cuda_rng": cuda}


def remove_old(folder: Path) -> None:
    """Removes all checkpoints but the newest KEPT."""
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def not_written(path: Path, found: str) -> MolError:
    """Of a checkpoint that the disk did not take."""
    return MolError(
        f"the checkpoint {path} could not be written: {found}",
        allowed="a disk with room for the weights and twice as much beside them",
        hint=f"free some space, then the same command with --resume, which goes on from "
        f"{last_good(path.parent)}",
    )


def last_good(folder: Path) -> str:
    """The newest checkpoint in words. All are good: a step that is not finite changes nothing."""
    folders = sorted(folder.glob("step-*"))
    return str(folders[-1]) if folders else "the beginning: no checkpoint was written yet"


def load_checkpoint(state: TrainState, checkpoint: Checkpoint) -> None:
    """Brings `state` to the checkpoint, whichever number of processes wrote it.

    Raises MolError if its tensors cannot be read.
    """
    folder = checkpoint.folder
    whole = folder / _TENSORS
    some = next(state.model.parameters())
    try:
        tensors = torch.load(
            whole if whole.is_file() else folder / GENERATORS,
            map_location="cpu",
            mmap=is_shared(some),  # a rank takes its own part alone
            weights_only=True,
        )
        if whole.is_file():
            load_whole(state.model, state.optimizer, tensors)
        else:
            # In place: these are the parameters, buffers and moments themselves.
            with warnings.catch_warnings():  # that one process reads, which is no mistake
                warnings.simplefilter("ignore")
                load(tensors_by_name(state.model, state.optimizer), checkpoint_id=folder)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, *_UNREADABLE) as error:
        raise _damaged(folder, error) from error
    torch.set_rng_state(tensors["rng"])
    # Another number of GPUs is no reason to stop: nothing in training draws from their generators.
    if some.is_cuda and len(tensors["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(tensors["cuda_rng"])
    restore_counters(state, checkpoint)


def restore_counters(state: TrainState, checkpoint: Checkpoint) -> None:
    """Brings the numbers of `state` to the checkpoint's."""
    for name, value in checkpoint.counters.items():
        setattr(state, name, value)


def _damaged(folder: Path, error: BaseException) -> MolError:
    return MolError(
        f"the checkpoint {folder} cannot be read: {error}",
        allowed="a whole checkpoint",
        hint=f"remove {folder}, and --resume goes on from the one before it",
    )
