"""The state of a run: everything that changes while it trains."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molcli.model import MoLForCausalLM
from molcli.stages.train.distributed import shard_like

MOMENTS = ("exp_avg", "exp_avg_sq")
_WORDS = {
    "model": "the weights",
    "exp_avg": "the mean gradient of",
    "exp_avg_sq": "the mean squared gradient of",
    "step": "the number of steps of",
}


def in_words(name: str) -> str:
    """Return a name of `TrainState.existing_tensors` in words."""
    kind, parameter = name.split(".", 1)
    return f"{_WORDS[kind]} {parameter}"


@dataclass
class TrainState:
    """Everything that changes during a run, and all that a checkpoint holds beside random states.

    The learning rate, the number of routed blocks and the data of a step follow from it.

    Attributes:
        model: float32 master weights; sharded if there are several ranks.
        optimizer: of the current stage; every stage begins with a fresh one.
        step: optimiser steps done, skipped ones included.
        stage: index of the current stage, from 0.
        stage_step: steps done in this stage.
        row: next position in the endless sequence of the stage's rows.
        tokens: seen in training, in all stages.
        skipped: steps skipped because their gradient was not finite.
        skipped_in_a_row: how many of the latest steps were skipped.
        seconds: of training, over all resumptions.
        loss: mean of the latest logged window.
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
        """Move to before the first step of the next stage."""
        self.stage, self.stage_step, self.row = self.stage + 1, 0, 0

    def counters(self) -> dict[str, Any]:
        """Return all numbers of the state, by name."""
        return {k: v for k, v in vars(self).items() if k not in ("model", "optimizer")}

    def restore_counters(self, counters: dict[str, Any]) -> None:
        """Set the numbers of the state to those that `counters` returned."""
        for name, value in counters.items():
            setattr(self, name, value)

    def tensors_by_name(self) -> dict[str, Tensor]:
        """Return `existing_tensors`, with moments that do not exist yet as the first step would
        make them.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                moments = self.optimizer.state[parameter]
                if not moments:
                    device = parameter.device if group["fused"] else "cpu"
                    moments["step"] = torch.zeros((), device=device)
                    moments |= {name: torch.zeros_like(parameter) for name in MOMENTS}
        return self.existing_tensors()

    def existing_tensors(self) -> dict[str, Tensor]:
        """Return weights, buffers, moments and step counts: the tensors themselves, not copies.

        Sharded ones are DTensors. A name is the kind and the parameter, such as
        "exp_avg.model.norm.weight", independent of the order in the optimiser.
        """
        stored, parameters = self.model.state_dict(), dict(self.model.named_parameters())
        # Tied weights are in the state dict twice.
        once = {*parameters, *(name for name, _ in self.model.named_buffers())}
        tensors = {f"model.{name}": tensor for name, tensor in stored.items() if name in once}
        names = {parameter: name for name, parameter in parameters.items()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                moments = self.optimizer.state.get(parameter, {})
                tensors |= {f"{kind}.{names[parameter]}": x for kind, x in moments.items()}
        return tensors

    def load_unsharded(self, tensors: dict[str, Any]) -> None:
        """Load the state dicts of one process; each rank takes its shards of them.

        Args:
            tensors: the state dicts "model" and "optimizer".
        """
        own = self.model.state_dict()
        self.model.load_state_dict({n: shard_like(own[n], x) for n, x in tensors["model"].items()})
        moments = tensors["optimizer"]["state"]
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        for number, parameter in enumerate(parameters):
            stored = moments.get(number, {})
            stored |= {n: shard_like(parameter, stored[n]) for n in MOMENTS if n in stored}
        self.optimizer.load_state_dict(tensors["optimizer"])
