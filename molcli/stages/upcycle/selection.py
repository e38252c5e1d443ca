"""Choose layers for `layers: auto` and `gated_deltanet: auto`, by the KL of converting each alone,
and for `skipped_layers: auto`, by how little a layer changes the residual.

Inputs: the parent and a calibration. Outputs: the configuration with the chosen layers, the
measured KL of each layer, nats per token, and its influence.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from molcli.config.layer_choice import cheapest
from molcli.config.sections import Recipe
from molcli.families.parent import Parent
from molcli.fitting.calibration import Calibration
from molcli.fitting.converted_config import mol_config, needs_text
from molcli.fitting.layer import fit_layer
from molcli.fitting.partition import block_parts
from molcli.fitting.residuals import (
    LayerSensitivity,
    influence,
    open_output_head,
    open_residuals,
    split_rows,
)
from molcli.model.checkpoint import default_device
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import Layer
from molcli.model.parent import dense_layer
from molcli.progress import Progress, phase, step

INFLUENCE_TOKENS = 16_384  # enough to rank layers by


@dataclass(frozen=True)
class Selection:
    """The configuration with the chosen layers, and what was measured to choose them.

    alone_kl: `attention_costs`, for `layers: auto`. gated_deltanet_kl: `deltanet_costs`, for
    `gated_deltanet: auto`. influence: `influences`, for `skipped_layers: auto`. All by layer, empty
    where nothing was measured.
    """

    config: MoLConfig
    alone_kl: dict[int, float]
    gated_deltanet_kl: dict[int, float]
    influence: dict[int, float]


def select_layers(
    parent: Parent, config: MoLConfig, text: Calibration | None, recipe: Recipe, progress: Progress
) -> Selection:
    """Choose the layers that the recipe leaves to a measurement; without text, none.

    config: of the recipe; its dtype is kept.
    """
    options = recipe.upcycle
    alone_kl: dict[int, float] = {}
    gated_deltanet_kl: dict[int, float] = {}
    measured: dict[int, float] = {}
    skipped = config.layer_structures.count("skipped")
    if text is not None and skipped and options.skipped_layers == "auto":
        measured = influences(parent, config, text, progress)
        candidates = [i for i in measured if not config.is_dense(i)]
        layers = sorted(sorted(candidates, key=lambda i: measured[i])[:skipped])
        dtype, config = config.dtype, mol_config(parent, replace(options, skipped_layers=layers))
        config.dtype = dtype
    if text is not None and options.layers == "auto" and needs_text(config, options):
        alone_kl = attention_costs(parent, config, text, recipe, progress)
        layers = sorted(cheapest(alone_kl, options.layers_budget))
        dtype, config = config.dtype, mol_config(parent, replace(options, layers=layers))
        config.dtype = dtype
    if text is not None and options.gated_deltanet == "auto" and config.num_routed_blocks > 0:
        gated_deltanet_kl = deltanet_costs(parent, config, text, recipe, progress)
        for i in cheapest(gated_deltanet_kl, options.gated_deltanet_budget):
            config.layer_mixers[i] = "gated_deltanet"
    return Selection(config, alone_kl, gated_deltanet_kl, measured)


def attention_costs(
    parent: Parent, config: MoLConfig, text: Calibration, recipe: Recipe, progress: Progress
) -> dict[int, float]:
    """Measure the KL of converting each of the parent's layers alone, with softmax attention."""
    config = copy.deepcopy(config)
    config.layer_structures = ["mixture"] * config.num_hidden_layers
    config.layer_mixers = ["attention"] * config.num_hidden_layers
    (costs,) = _costs_alone(parent, config, text, recipe, ["attention"], progress)
    return costs


@torch.no_grad()
def influences(
    parent: Parent, config: MoLConfig, text: Calibration, progress: Progress
) -> dict[int, float]:
    """Measure the `influence` of each layer, on INFLUENCE_TOKENS of the text to fit on."""
    device, rows = default_device(), text.fit
    rows = rows.select(slice(0, max(1, INFLUENCE_TOKENS // rows.input_ids.shape[1])))
    residuals = open_residuals(rows, config, parent.embedding(), device)
    measuring, found = phase(progress, "measuring"), {}
    for i in range(config.num_hidden_layers):
        dense, before = dense_layer(parent, config, i, device), residuals.parent
        residuals.advance(dense, dense)
        found[i] = influence(before, residuals.parent)
        measuring(i + 1, config.num_hidden_layers)
    return found


def deltanet_costs(
    parent: Parent, config: MoLConfig, text: Calibration, recipe: Recipe, progress: Progress
) -> dict[int, float]:
    """Measure how much the KL of converting each layer alone is larger with Gated DeltaNet than
    with softmax attention."""
    mixers = ["attention", "gated_deltanet"]
    attention, deltanet = _costs_alone(parent, config, text, recipe, mixers, progress)
    return {i: deltanet[i] - attention[i] for i in attention}


@torch.no_grad()
def _costs_alone(
    parent: Parent,
    config: MoLConfig,
    text: Calibration,
    recipe: Recipe,
    mixers: Sequence[str],
    progress: Progress,
) -> list[dict[int, float]]:
    """KL(parent || parent with one layer converted), by mixer, then by layer that is not dense.

    Measured on text that the layers are not fitted to: the last of the rows to fit on.
    """
    device, config = default_device(), copy.deepcopy(config)
    converted = [i for i in range(config.num_hidden_layers) if not config.is_dense(i)]
    fit, kept = split_rows(text.fit)
    embedding = parent.embedding()
    residuals = open_residuals(fit, config, embedding, device)
    sensitivities = {mixer: LayerSensitivity(kept, config, embedding, device) for mixer in mixers}
    measuring = phase(progress, "measuring")
    for i in range(config.num_hidden_layers):
        dense = dense_layer(parent, config, i, device)
        after = residuals
        for mixer, sensitivity in sensitivities.items():
            layer: Layer = dense
            if i in converted:
                config.layer_mixers[i] = mixer
                # A copy whose parent and student are one tensor: the fit leaves that unchanged.
                after = replace(residuals)
                layer = fit_layer(
                    config,
                    i,
                    block_parts(config),
                    dense,
                    after,
                    text.moment(i).to(device),
                    recipe.upcycle,
                    torch.Generator().manual_seed(recipe.calibrate.seed),
                ).layer
            sensitivity.advance(i, dense, layer)
        if after is residuals:
            residuals.advance(dense, dense)
        else:
            residuals.parent = residuals.student = after.parent
        del after
        measuring(i + 1, config.num_hidden_layers)
    head = open_output_head(parent, device)
    with step(progress, "comparing"):
        return [sensitivities[mixer].kl_by_layer(head) for mixer in mixers]
