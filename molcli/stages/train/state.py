"""Where a run stands, and how it survives being stopped."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from molcli.config.sections import TrainConfig
from molcli.errors import MolError
from molcli.io.folder import output_folder

KEPT = 2  # checkpoints: the newest, and the one before it
_TENSORS, _PROGRESS = "state.pt", "progress.json"
# What may differ between a run and its resumption without changing what is trained.
_FREE_SETTINGS = ("data", "logits", "checkpoint_every", "log_every")


@dataclass
class TrainState:
    """Everything that changes during a run. The learning rate and the data follow from it.

    step: optimiser steps done, skipped ones included. row: place in the endless sequence of rows.
    tokens: seen in training. skipped: steps left out because their gradient was not finite.
    seconds: spent, over all resumptions. loss: of the newest logged window.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    row: int = 0
    tokens: int = 0
    skipped: int = 0
    seconds: float = 0.0
    loss: float = float("nan")


def run_identity(config: TrainConfig, *, data: str, checkpoint: str, parent: str) -> dict[str, Any]:
    """What a resumed run must share with the one that it continues, as plain JSON values.

    data, checkpoint, parent: fingerprints of the packed rows and of the two models.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in _FREE_SETTINGS}
    identity = {**settings, "the data": data, "the checkpoint": checkpoint, "the parent": parent}
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def save_checkpoint(state: TrainState, folder: Path, identity: dict[str, Any]) -> None:
    """Writes folder/step-N, whole or not at all, then removes all but the newest KEPT."""
    counters = {k: v for k, v in vars(state).items() if k not in ("model", "optimizer")}
    with output_folder(folder / f"step-{state.step:08d}") as staging:
        tensors = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        torch.save(tensors, staging / _TENSORS)
        (staging / _PROGRESS).write_text(json.dumps({"state": counters, "identity": identity}))
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(state: TrainState, folder: Path, identity: dict[str, Any]) -> None:
    """Brings `state` to the newest checkpoint in `folder`; leaves it alone if there is none.

    Raises MolError if that checkpoint belongs to another recipe, data set, model or parent.
    """
    checkpoints = sorted(folder.glob("step-*"))
    if not checkpoints:
        return
    newest = checkpoints[-1]
    progress = json.loads((newest / _PROGRESS).read_text())
    _refuse_another_run(newest, progress["identity"], identity)
    device = next(state.model.parameters()).device
    tensors = torch.load(newest / _TENSORS, map_location="cpu", weights_only=True)
    state.model.load_state_dict(tensors["model"])
    state.optimizer.load_state_dict(tensors["optimizer"])
    torch.set_rng_state(tensors["rng"])
    if device.type == "cuda":
        torch.cuda.set_rng_state_all(tensors["cuda_rng"])
    for name, value in progress["state"].items():
        setattr(state, name, value)


def _refuse_another_run(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [key for key in now if then.get(key) != now[key]]
    if changed:
        what = "; ".join(
            f"`train.{key}` was {then.get(key)} and is {now[key]}"
            if hasattr(TrainConfig, key)
            else f"{key} was another one"
            for key in changed
        )
        raise MolError(
            f"{folder} belongs to another run: {what}",
            allowed="the recipe, data, checkpoint and parent that the run began with",
            hint="the same command as before with --resume, or another output folder",
        )
