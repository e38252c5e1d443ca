"""Inspect: count the tokens that each routed block of a model processes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molcli.config.sections import InspectConfig
from molcli.data.mixture import load_rows
from molcli.data.packing import Batch
from molcli.data.tokenizer import open_tokenizer
from molcli.errors import MolError
from molcli.maths.figures import check_activations
from molcli.maths.routing_stats import RoutingCounts, RoutingSummary, count_routing, summarise
from molcli.model.checkpoint import default_device, open_checkpoint, open_config
from molcli.progress import Progress, silent


@dataclass(frozen=True)
class LayerRouting:
    """Routing of one Mixture of Layers layer.

    Attributes:
        layer: index in the model.
        mixer: kind of the routed blocks' mixers.
        summary: figures of the routing.
    """

    layer: int
    mixer: str
    summary: RoutingSummary


@dataclass(frozen=True)
class RoutingReport:
    """Routing of all Mixture of Layers layers on one text.

    Attributes:
        checkpoint: path of the model.
        data: source of the text.
        tokens: number of tokens that were routed.
        num_shared_blocks: blocks that run on every token.
        num_routed_blocks: blocks that the router chooses from.
        top_k: blocks that it chooses for each token.
        layers: in the order of the model.
    """

    checkpoint: str
    data: str
    tokens: int
    num_shared_blocks: int
    num_routed_blocks: int
    top_k: int
    layers: list[LayerRouting]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON, with each layer's figures beside its index and mixer."""
        layers = [
            {"layer": layer.layer, "mixer": layer.mixer, **asdict(layer.summary)}
            for layer in self.layers
        ]
        return {**asdict(self), "layers": layers}


def inspect_routing(
    checkpoint: Path, data: str, config: InspectConfig, progress: Progress = silent
) -> RoutingReport:
    """Run text through a checkpoint and summarise its routing.

    Args:
        checkpoint: folder of a Mixture of Layers model.
        data: source of the text.
        config: tokens, context length, batch size and the threshold of dead blocks.
        progress: called with processed and total tokens.

    Raises:
        MolError: the folder has no such model, the model has no routed blocks, or the data cannot
            be read.
    """
    device = default_device()
    open_config(checkpoint).check_context(config.context_length, "inspect.context_length")
    model = open_checkpoint(checkpoint, device)
    settings = model.config
    routed = [i for i in range(settings.num_hidden_layers) if settings.is_routed(i)]
    if not routed:
        raise MolError(
            f"{checkpoint} routes nothing: "
            f"{settings.num_shared_blocks} of {settings.num_blocks} blocks are shared",
            allowed="a model with routed blocks",
        )
    rows = load_rows(
        data,
        open_tokenizer(checkpoint),
        vocab_size=settings.vocab_size,
        length=config.context_length,
        limit=config.tokens,
        pad_last=True,
    )
    counts: dict[int, RoutingCounts] = {}
    tokens = 0
    for batch in rows.batches(config.batch_size, device):
        with torch.no_grad():
            out = model.model(**batch.inputs(), use_cache=False)
        # What overflows in one layer stays so in the next: the last one shows it.
        check_activations("the model's activations", out.last_hidden_state)
        documents = _flat_documents(batch)
        for layer, routing in zip(routed, out.routing, strict=True):
            new = count_routing(
                routing.blocks, routing.weights, documents, settings.num_routed_blocks
            )
            old = counts.get(layer)
            counts[layer] = new if old is None else old + new
        tokens += len(documents)
        progress(tokens, rows.tokens)
    return RoutingReport(
        checkpoint=str(checkpoint),
        data=data,
        tokens=tokens,
        num_shared_blocks=settings.num_shared_blocks,
        num_routed_blocks=settings.num_routed_blocks,
        top_k=settings.num_blocks_per_tok,
        layers=[
            LayerRouting(
                layer,
                settings.layer_labels[layer],
                summarise(count, dead_share=config.dead_share),
            )
            for layer, count in sorted(counts.items())
        ],
    )


def _flat_documents(batch: Batch) -> Tensor:
    """Document ids of the unpadded tokens, (n,), row by row; distinct across rows."""
    ids = batch.document_ids
    row = torch.arange(len(ids), device=ids.device)[:, None]
    unique = row * (int(ids.max()) + 1) + ids
    return unique.flatten() if batch.attention_mask is None else unique[batch.attention_mask.bool()]
