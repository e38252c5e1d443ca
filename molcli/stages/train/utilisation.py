"""How much of the devices a stage's useful operations take."""

import torch

from molcli.config.stages import Stage
from molcli.io.machine import device_name
from molcli.maths.peak import bf16_peak
from molcli.model import MoLForCausalLM
from molcli.model.flops import training_flops
from molcli.model.precision import matmul_dtype


def flops_share(
    stage: Stage, model: MoLForCausalLM, parent: MoLForCausalLM | None, ranks: int
) -> float | None:
    """Model FLOPs utilisation at one token a second; None unless the devices' peak is known.

    Counts active blocks, at the checkpoint's own number, and forward passes once: what gradient
    checkpointing repeats is no use. A trained weight counts 6, a frozen one 4 or 2, as
    `training_flops` says. parent: that the stage runs.
    """
    device = next(model.parameters()).device
    peak = bf16_peak(device_name(device))
    if peak is None or matmul_dtype(stage.settings, device) != torch.bfloat16:
        return None
    flops = training_flops(
        model.config,
        stage.settings.context_length,
        parent=None if parent is None else parent.config,
        trainable=stage.settings.trainable,
        layerwise=stage.kind == "align",
    )
    return flops / (peak * ranks)
