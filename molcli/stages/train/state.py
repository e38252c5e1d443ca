"""Where a run stands, and how it survives being stopped."""

import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from molcli.errors import MolError
from molcli.io.folder import output_folder
from molcli.model import MoLForCausalLM

KEPT = 2  # checkpoints: the newest, and the one before it
_TENSORS, _PROGRESS = "state.pt", "progress.json"


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
        progress = json.loads((folders[-1] / _PROGRESS).read_text())
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
    counters = {k: v for k, v in vars(state).items() if k not in ("model", "optimizer")}
    tensors = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    need = sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
    try:
        with output_folder(path, need_bytes=need) as staging:
            torch.save(tensors, staging / _TENSORS)
            (staging / _PROGRESS).write_text(json.dumps({"state": counters, "identity": identity}))
    # torch reports a full disk as a RuntimeError of its zip writer.
    except (OSError, RuntimeError, MolError) as error:
        found = error.found if isinstance(error, MolError) else str(error)
        raise MolError(
            f"the checkpoint {path} could not be written: {found}",
            allowed=f"room for {need / 1e9:.2f} GB",
            hint=f"free some space, then the same command with --resume, which goes on from "
            f"{last_good(folder)}",
        ) from error
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    return path


def last_good(folder: Path) -> str:
    """The newest checkpoint in words. All are good: a step that is not finite changes nothing."""
    folders = sorted(folder.glob("step-*"))
    return str(folders[-1]) if folders else "the beginning: no checkpoint was written yet"


def load_checkpoint(state: TrainState, checkpoint: Checkpoint) -> None:
    """Brings `state` to the checkpoint. Raises MolError if its tensors cannot be read."""
    device = next(state.model.parameters()).device
    try:
        tensors = torch.load(checkpoint.folder / _TENSORS, map_location="cpu", weights_only=True)
        state.model.load_state_dict(tensors["model"])
        state.optimizer.load_state_dict(tensors["optimizer"])
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise _damaged(checkpoint.folder, error) from error
    torch.set_rng_state(tensors["rng"])
    # Another number of GPUs is no reason to stop: nothing in training draws from their generators.
    if device.type == "cuda" and len(tensors["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(tensors["cuda_rng"])
    restore_counters(state, checkpoint)


def restore_counters(state: TrainState, checkpoint: Checkpoint) -> None:
    """Brings the numbers of `state` to the checkpoint's."""
    for name, value in checkpoint.counters.items():
        setattr(state, name, value)


def _damaged(folder: Path, error: Exception) -> MolError:
    return MolError(
        f"the checkpoint {folder} cannot be read: {error}",
        allowed="a whole checkpoint",
        hint=f"remove {folder}, and --resume goes on from the one before it",
    )
