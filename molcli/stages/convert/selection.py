"""What each layer costs, for `auto`."""

import torch

from molcli.io.packing import TokenRows
from molcli.model.checkpoint import default_device
from molcli.model.sensitivity import Sensitivity, split_rows
from molcli.model.streams import open_streams
from molcli.progress import Progress
from molcli.stages.convert.choice import converted_config
from molcli.stages.convert.layer import convert_layer
from molcli.stages.convert.source import Source


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
