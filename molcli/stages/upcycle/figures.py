"""What the receipt says of one layer."""

from typing import Any

import torch
from torch import Tensor

from molcli.maths.routing_stats import count_routing, routing_margin, summarise
from molcli.model.layers import DenseLayer, MoLLayer
from molcli.model.streams import Streams

DEAD_SHARE = 0.01


@torch.no_grad()
def advance(
    fit: Streams, heldout: Streams, dense: DenseLayer, converted: DenseLayer | MoLLayer
) -> dict[str, Any]:
    """Moves the held-out residuals past a layer; returns the receipt's figures for it.

    fit: past it already. converted: `dense` where the parent's layer is kept.

    On held-out tokens, student and parent each on their own residual:
    delta_error: mean over tokens of |student's delta - parent's|^2 / |parent's|^2, where a delta is
    what the layer adds: 0 is exact, 1 is what leaving the layer out costs. norm_ratio: mean over
    tokens of |student's delta| / |parent's|. residual_error: as delta_error, of the residual after
    the layer; residual_error_fit on the tokens that blocks were fitted to. routing: see
    `routing_figures`, None where nothing is routed.
    """
    before_parent, before = heldout.parent, heldout.student
    heldout.advance(dense, converted)
    wanted, delta = heldout.parent - before_parent, heldout.student - before
    errors = (delta - wanted).square().sum(-1) / wanted.square().sum(-1)
    row: dict[str, Any] = {
        "delta_error": errors.mean().item(),
        "norm_ratio": (delta.norm(dim=-1) / wanted.norm(dim=-1)).mean().item(),
        "residual_error": heldout.error(),
        "residual_error_fit": fit.error(),
    }
    if isinstance(converted, MoLLayer):
        row["routing"] = routing_figures(converted, heldout, before, errors)
    return row


def routing_figures(
    layer: MoLLayer, streams: Streams, x: Tensor, errors: Tensor
) -> dict[str, Any] | None:
    """Of the residual x (n, d_model) before the layer; lists have an entry per routed block.

    load_share, entropy, dead_blocks: as `molcli inspect` has them. margin: `routing_margin`.
    delta_error: mean of `errors` (n,) over the tokens that the block sees, None without any.
    """
    if layer.router is None:
        return None
    routing = layer.router(x)
    count = routing.logits.shape[1]
    document = streams.documents()
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
