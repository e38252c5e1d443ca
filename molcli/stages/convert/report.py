"""What a conversion says about itself: convert.json."""

from typing import Any

from molcli.config.sections import Recipe
from molcli.io.machine import device_name, versions
from molcli.maths.parameters import count_parameters
from molcli.model.checkpoint import default_device
from molcli.model.configuration_mol import MoLConfig
from molcli.stages.convert.source import Source


def report(
    source: Source,
    after: MoLConfig,
    recipe: Recipe,
    layers: list[dict[str, Any]],
    heldout: dict[str, float] | None,
) -> dict[str, Any]:
    """Plain values.

    layers: a row per converted layer, on held-out tokens: delta_error_start and delta_error, before
    and after the steps of Adam, of what the layer adds, on the converted model's own residual;
    residual_error, of the residual after it, towards the original model's; kl_alone, what `auto`
    measured. All errors are relative squared ones. heldout: cross-entropy of both models, and
    KL(original || converted), nats a token.
    """
    before_count, after_count = count_parameters(source.config), count_parameters(after)
    losses = None
    if heldout is not None:
        losses = {
            "tokens": heldout["tokens"],
            "original_ce": heldout["parent_ce"],
            "ce": heldout["ce"],
            "kl": heldout["kl"],
        }
    return {
        "checkpoint": {
            "folder": str(source.folder),
            "fingerprint": source.reader.fingerprint(),
        },
        "seed": recipe.calibrate.seed,
        "parameters": {
            "original_total": before_count.total,
            "original_active": before_count.active,
            "total": after_count.total,
            "active": after_count.active,
        },
        "heldout": losses,
        "layers": layers,
        "versions": versions(),
        "device": device_name(default_device()),
    }
