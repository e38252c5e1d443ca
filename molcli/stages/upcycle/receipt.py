"""Measure each converted layer on held-out text, and assemble receipt.json."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molcli.config.sections import Recipe
from molcli.estimate.flops import count_flops
from molcli.estimate.parameters import count_parameters
from molcli.families.parent import Parent
from molcli.fitting.calibration import Calibration
from molcli.fitting.residuals import Residuals, relative_errors
from molcli.maths.routing_stats import count_routing, routing_margin, summarise
from molcli.model.checkpoint import default_device
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import ConvertedLayer, DenseLayer, Layer
from molcli.model.routing.router import Routing
from molcli.report.machine import device_name, versions

DEAD_SHARE = 0.01  # of a uniform load; blocks below it count as dead


@torch.no_grad()
def layer_figures(
    fit: Residuals, heldout: Residuals, dense: DenseLayer, converted: Layer
) -> dict[str, Any]:
    """Move the held-out residuals past a layer, and return its figures for the receipt.

    Args:
        fit: the residuals of the text to fit on, after the layer.
        heldout: those of the held-out text, before the layer.
        dense: the parent's layer.
        converted: the student's; `dense` where that is kept.

    Returns:
        Figures on held-out tokens, where student and parent each have their own residual, and
        a delta is what the layer adds.
        delta_error: mean over tokens of |student's delta - parent's|^2 / |parent's|^2; 0 is exact,
            1 is the error of a layer that adds nothing.
        norm_ratio: mean over tokens of |student's delta| / |parent's|, without those to which the
            parent adds nothing; None if it adds nothing to any.
        residual_error: as delta_error, of the residual after the layer; residual_error_fit on the
            tokens that blocks were fitted to.
        routing: `routing_figures` of a MoL layer, None where nothing is routed.
    """
    before_parent, before = heldout.parent, heldout.student
    heldout.advance(dense, converted)
    wanted, delta = heldout.parent - before_parent, heldout.student - before
    errors, sizes = relative_errors(delta, wanted), wanted.norm(dim=-1)
    ratios = (delta.norm(dim=-1) / sizes)[sizes > 0]
    row: dict[str, Any] = {
        "delta_error": errors.mean().item(),
        "norm_ratio": ratios.mean().item() if len(ratios) else None,
        "residual_error": heldout.error(),
        "residual_error_fit": fit.error(),
    }
    if isinstance(converted, ConvertedLayer):
        row["routing"] = routing_figures(converted, heldout, before, errors)
    return row


def routing_figures(
    layer: ConvertedLayer, residuals: Residuals, x: Tensor, errors: Tensor
) -> dict[str, Any] | None:
    """Measure how a layer routes the held-out tokens; lists have an entry per routed block.

    Args:
        layer: the student's.
        residuals: for the documents of the tokens.
        x: (n, d_model), the student's residual before the layer.
        errors: (n,), the delta_error of each token.

    Returns:
        None without routed blocks.
        load_share, entropy, dead_blocks: as in `molcli inspect`. margin: `routing_margin`.
        delta_error: mean of `errors` over the tokens that a block sees, None without any.
    """
    if layer.router is None:
        return None
    found = [layer(x[c.tokens], c.context.forward_context())[1] for c in residuals.chunks]
    routing = Routing(
        torch.cat([r.logits for r in found]),
        torch.cat([r.blocks for r in found]),
        torch.cat([r.weights for r in found]),
    )
    count = routing.logits.shape[1]
    document = residuals.documents()
    counts = count_routing(routing.blocks, routing.weights, document, count)
    summary = summarise(counts, dead_share=DEAD_SHARE)
    seen = errors[:, None].expand_as(routing.blocks).flatten().double()
    sums = torch.bincount(routing.blocks.flatten(), weights=seen, minlength=count)
    return {
        "load_share": summary.load_share,
        "entropy": summary.entropy,
        "dead_blocks": summary.dead_blocks,
        "margin": routing_margin(routing.logits + layer.router.correction_bias, layer.router.top_k),
        "delta_error": [
            total / chosen if chosen else None
            for total, chosen in zip(sums.tolist(), counts.chosen.tolist(), strict=True)
        ],
    }


@dataclass(frozen=True)
class Measured:
    """What was measured of a conversion; None where it was not.

    layers: a row per layer: its kind, `layer_figures`, and under auto the KL of `Selection`.
    heldout: `OutputHead.losses` of the student. baselines: `Comparison.figures`.
    """

    layers: list[dict[str, Any]]
    heldout: dict[str, float] | None = None
    baselines: dict[str, dict[str, Any]] | None = None


def make_receipt(
    parent: Parent,
    config: MoLConfig,
    recipe: Recipe,
    text: Calibration | None,
    measured: Measured,
    continuations: list[dict[str, str]] | None,
    seconds: float,
) -> dict[str, Any]:
    """Assemble receipt.json as plain values.

    parameters, flops (per token, `count_flops`): of the student, total and active, and of the
    parent. calibration: the contents of calibration.json, with hashes of parent and data.
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
