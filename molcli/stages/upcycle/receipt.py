"""What a conversion says about itself: receipt.json."""

from dataclasses import dataclass
from typing import Any

from molcli.config.sections import Recipe
from molcli.io.calibration import Calibration
from molcli.io.machine import device_name, versions
from molcli.io.parent import Parent
from molcli.maths.parameters import count_parameters
from molcli.model.checkpoint import default_device
from molcli.model.configuration_mol import MoLConfig
from molcli.model.flops import count_flops


@dataclass(frozen=True)
class Measured:
    """layers: a row per layer (`figures.advance`, and `layer_costs` and `deltanet_costs` under
    auto). heldout: `Ending.figures` of the student. baselines: `Comparison.figures`. None where
    that was not measured."""

    layers: list[dict[str, Any]]
    heldout: dict[str, float] | None = None
    baselines: dict[str, dict[str, Any]] | None = None


def receipt(
    parent: Parent,
    config: MoLConfig,
    recipe: Recipe,
    text: Calibration | None,
    measured: Measured,
    continuations: list[dict[str, str]] | None,
    seconds: float,
) -> dict[str, Any]:
    """Plain values.

    parameters, flops (a token, `count_flops`): of the student, total and active, and the parent's.
    calibration: what it wrote about itself, with hashes of parent and data.
    """
    dense = MoLConfig(**parent.mol_config_kwargs())
    count = count_parameters(config)
    length = recipe.calibrate.context_length if text is None else text.heldout.input_ids.shape[1]
    flops = count_flops(config, length)
    return {
        "parent": {"name": parent.name, "fingerprint": parent.fingerprint()},
        "method": recipe.upcycle.method,
        "seed": recipe.calibrate.seed,
        "calibration": None if text is None else text.about,
        "parameters": {
            "total": count.total,
            "active": count.active,
            "parent": count_parameters(dense).total,
        },
        "flops": {
            "total": flops.total,
            "active": flops.active,
            "parent": count_flops(dense, length).total,
            "context_length": length,
        },
        "heldout": measured.heldout,
        "baselines": measured.baselines,
        "layers": measured.layers,
        "continuations": continuations,
        "seconds": round(seconds, 1),
        "device": device_name(default_device()),
        "versions": versions(),
    }
