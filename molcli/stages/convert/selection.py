"""Choose the layers to convert, by the user's choice or by the KL of converting each alone."""

import copy
from dataclasses import dataclass

import torch

from molcli.config.layer_choice import LayerChoice, chosen_layers, refuse_beyond
from molcli.data.packing import TokenRows
from molcli.errors import MolError
from molcli.fitting.residuals import LayerSensitivity, open_residuals, split_rows
from molcli.model.checkpoint import default_device
from molcli.model.configuration_mol import MoLConfig
from molcli.progress import Progress, phase, step
from molcli.stages.convert.layer import convert_layer
from molcli.stages.convert.source import SourceCheckpoint

KEY = "convert.gated_deltanet"


@dataclass(frozen=True)
class LayerSelection:
    """The layers to convert.

    layers: None where they are to be chosen by `layer_costs`. candidates: the layers that "all",
    "every:N" and "auto" choose from, those whose routed blocks use softmax attention.
    """

    layers: set[int] | None
    candidates: list[int]


def select_layers(config: MoLConfig, choice: LayerChoice) -> LayerSelection:
    """Apply the user's choice to a model. Raises MolError where the model has no such layers."""
    routed = config.num_routed_blocks > 0
    present = [i for i in range(config.num_hidden_layers) if not config.is_skipped(i)]
    with_attention = [i for i in present if config.layer_mixers[i] == "attention"]
    candidates = [i for i in with_attention if routed and config.layer_structures[i] == "mixture"]
    if isinstance(choice, str):
        if choice != "none" and not candidates:
            raise MolError(
                f"`{KEY}` is {choice}, but no layer has routed blocks with softmax attention",
                allowed="dense or sliced layers by their numbers, such as [0, 2]",
            )
        layers = None if choice == "auto" else chosen_layers(choice, candidates)
        return LayerSelection(layers, candidates)
    refuse_beyond(KEY, choice, config.num_hidden_layers)
    dense = [i for i in with_attention if config.layer_structures[i] in ("dense", "sliced")]
    for i in choice:
        if i not in candidates and i not in dense:
            if config.is_skipped(i):
                why = "is left out of this model"
            elif i in with_attention:
                why = "has shared blocks alone"
            else:
                why = "uses Gated DeltaNet already"
            raise MolError(
                f"`{KEY}` names layer {i}, which {why}",
                allowed=f"layers {sorted(candidates + dense)}",
            )
    return LayerSelection(set(choice), candidates)


def with_gated_deltanet(config: MoLConfig, layers: set[int]) -> MoLConfig:
    """Copy a configuration, with Gated DeltaNet in the routed or dense blocks of these layers."""
    after = copy.deepcopy(config)
    for i in layers:
        after.layer_mixers[i] = "gated_deltanet"
    return after


@torch.no_grad()
def layer_costs(
    source: SourceCheckpoint,
    candidates: list[int],
    rows: TokenRows,
    penalty: float,
    progress: Progress,
) -> dict[int, float]:
    """Measure KL(original || original with one layer converted), nats per token, by candidate.

    Args:
        source: the checkpoint to convert.
        candidates: layers to measure.
        rows: text. The last of them measure, the others are fitted to.
        penalty: of the regressions (`ridge`).
        progress: its phase "measuring" counts layers.
    """
    device, config = default_device(), source.config
    fit, kept = split_rows(rows)
    embedding = source.embedding()
    residuals = open_residuals(fit, config, embedding, device)
    sensitivity = LayerSensitivity(kept, config, embedding, device)
    after = with_gated_deltanet(config, set(candidates))
    last = max(candidates)
    measuring = phase(progress, "measuring")
    for i in range(config.num_hidden_layers):
        layer = converted = source.layer(i, device)
        if i in candidates:
            converted = convert_layer(after, i, layer, residuals.parent, residuals.chunks, penalty)
        sensitivity.advance(i, layer, converted)
        if i < last:
            residuals.advance(layer, layer)
        measuring(i + 1, config.num_hidden_layers)
    with step(progress, "comparing"):
        return sensitivity.kl_by_layer(source.output_head(device))
