"""Which layers are converted, and what each of them costs."""

import copy
from dataclasses import dataclass

import torch

from molcli.config.layer_choice import LayerChoice, chosen_layers, refuse_beyond
from molcli.data.packing import TokenRows
from molcli.errors import MolError
from molcli.fitting.streams import Sensitivity, open_streams, split_rows
from molcli.model.checkpoint import default_device
from molcli.model.configuration_mol import MoLConfig
from molcli.progress import Progress
from molcli.stages.convert.layer import convert_layer
from molcli.stages.convert.source import Source

NAME = "convert.gated_deltanet"


@dataclass(frozen=True)
class Plan:
    """layers: those to convert, None where they have yet to be measured. candidates: those that
    "all", "every:N" and "auto" choose from, whose routed blocks use softmax attention."""

    layers: set[int] | None
    candidates: list[int]


def plan_layers(config: MoLConfig, choice: LayerChoice) -> Plan:
    """Raises MolError for a choice that the model has no such layers for."""
    routed = config.num_routed_blocks > 0
    with_attention = [i for i, mixer in enumerate(config.layer_mixers) if mixer == "attention"]
    candidates = [i for i in with_attention if routed and not config.is_dense(i)]
    if isinstance(choice, str):
        if choice != "none" and not candidates:
            raise MolError(
                f"`{NAME}` is {choice}, but no layer has routed blocks with softmax attention",
                allowed="dense layers by their numbers, such as [0, 2]",
            )
        return Plan(None if choice == "auto" else chosen_layers(choice, candidates), candidates)
    refuse_beyond(NAME, choice, config.num_hidden_layers)
    dense = [i for i in with_attention if config.is_dense(i)]
    for i in choice:
        if i not in candidates and i not in dense:
            linear = i not in with_attention
            why = "uses Gated DeltaNet already" if linear else "has shared blocks alone"
            raise MolError(
                f"`{NAME}` names layer {i}, which {why}",
                allowed=f"layers {sorted(candidates + dense)}",
            )
    return Plan(set(choice), candidates)


def converted_config(config: MoLConfig, layers: set[int]) -> MoLConfig:
    """A copy in which these layers use Gated DeltaNet, routed or dense."""
    after = copy.deepcopy(config)
    for i in layers:
        after.layer_mixers[i] = "gated_deltanet"
    return after


@torch.no_grad()
def layer_costs(
    source: Source, candidates: list[int], rows: TokenRows, penalty: float, progress: Progress
) -> dict[int, float]:
    """KL(original || original with one layer converted), nats a token, by candidate.

    Measured on text that the layers are not fitted to: the last of `rows`.
    """
    device, config = default_device(), source.config
    fit, kept = split_rows(rows)
    embedding = source.embedding()
    streams = open_streams(fit, config, embedding, device)
    sensitivity = Sensitivity(kept, config, embedding, device)
    after = converted_config(config, set(candidates))
    last = max(candidates)
    for i in range(config.num_hidden_layers):
        layer = altered = source.layer(i, device)
        if i in candidates:
            altered = convert_layer(after, i, layer, streams.parent, streams.chunks, penalty)
        sensitivity.advance(i, layer, altered)
        if i < last:
            streams.advance(layer, layer)
        progress(i + 1, config.num_hidden_layers, "measuring each layer alone")
    return sensitivity.figures(source.ending(device))
