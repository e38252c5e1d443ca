"""`layers: auto` and `gated_deltanet: auto`: what it costs to convert each layer alone."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from molcli.config.sections import Recipe
from molcli.families.parent import Parent
from molcli.fitting.calibration import Calibration
from molcli.fitting.layer import fit_layer
from molcli.fitting.shapes import parts
from molcli.fitting.streams import Sensitivity, open_output_head, open_streams, split_rows
from molcli.model.checkpoint import default_device
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import Layer
from molcli.model.parent import dense_layer
from molcli.progress import Progress

MIXERS = ("attention", "gated_deltanet")


def layer_costs(
    parent: Parent, config: MoLConfig, text: Calibration, recipe: Recipe, progress: Progress
) -> dict[int, float]:
    """KL(parent || parent with one layer converted), nats a token: of every layer of the parent,
    with softmax attention."""
    config = copy.deepcopy(config)
    config.layer_structures = ["mixture"] * config.num_hidden_layers
    config.layer_mixers = ["attention"] * config.num_hidden_layers
    (costs,) = _costs_alone(parent, config, text, recipe, ["attention"], progress)
    return costs


def deltanet_costs(
    parent: Parent, config: MoLConfig, text: Calibration, recipe: Recipe, progress: Progress
) -> dict[int, float]:
    """KL(parent || parent with one layer converted), nats a token: by layer, how much more of it
    there is with Gated DeltaNet than with softmax."""
    softmax, deltanet = _costs_alone(parent, config, text, recipe, MIXERS, progress)
    return {i: deltanet[i] - softmax[i] for i in softmax}


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
    streams = open_streams(fit, config, embedding, device)
    by_mixer = {mixer: Sensitivity(kept, config, embedding, device) for mixer in mixers}
    for i in range(config.num_hidden_layers):
        dense = dense_layer(parent, config, i, device)
        past = streams
        for mixer, sensitivity in by_mixer.items():
            layer: Layer = dense
            if i in converted:
                config.layer_mixers[i] = mixer
                past = replace(streams)  # whose residual is the student's, too: it stays as it is
                layer = fit_layer(
                    config,
                    i,
                    parts(config),
                    dense,
                    past,
                    text.moment(i).to(device),
                    recipe.upcycle,
                    torch.Generator().manual_seed(recipe.calibrate.seed),
                ).layer
            sensitivity.advance(i, dense, layer)
        if past is streams:
            streams.advance(dense, dense)
        else:
            streams.parent = streams.student = past.parent
        del past
        progress(i + 1, config.num_hidden_layers, "measuring each layer alone")
    ending = open_output_head(parent, device)
    return [by_mixer[mixer].figures(ending) for mixer in mixers]
