"""The tensors of a run: those of the model, and what AdamW keeps of each parameter."""

from typing import Any

import torch
from torch import Tensor

from molcli.model import MoLForCausalLM
from molcli.stages.train.ranks import like

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
