"""Starts without a fit, in the same shape: what a fitted conversion has to beat.

"random": thin blocks as `molcli init` draws them. "svd": the weights alone, truncated; thin_in
spans what a block's heads and neurons read most, thin_out what they write most, turned so that
heads write where the FFN reads. "pca": both are the leading directions of the calibration residual.
The matrices in between are the parent's, projected: at full width, the last two are the parent.

All route alike, by clusters of the parent's own residual; the clones of a family start equal.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molcli.io.calibration import Calibration
from molcli.maths.partition import Part
from molcli.model.configuration_mol import MoLConfig
from molcli.model.context import Context
from molcli.model.layers import DenseLayer, MoLLayer
from molcli.model.modeling_mol import MoLModel
from molcli.stages.upcycle.layer import FittedLayer, clones_of_families, set_router
from molcli.stages.upcycle.projection import Share, pca_bases, project, svd_bases

Method = Literal["random", "svd", "pca"]
METHODS: tuple[Method, ...] = ("random", "svd", "pca")


@dataclass(frozen=True)
class ParentLayer:
    """What baselines are made from: layer `index` of the parent.

    parts: the shares of the layer, shared blocks first, then one per routed family. x: (n,
    d_model), the parent's residual before the layer, on the text to fit on; context: of those
    tokens.
    """

    index: int
    dense: DenseLayer
    parts: list[Part]
    x: Tensor
    context: Context
    calibration: Calibration

    def moment(self) -> Tensor:
        """(d_model, d_model) float64, of the residual at unit rms."""
        return self.calibration.moment(self.index).to(self.x.device)


@torch.no_grad()
def baseline_layer(
    method: Method, config: MoLConfig, parent: ParentLayer, seed: int
) -> FittedLayer:
    """The Mixture of Layers layer of a method. The seed decides, whatever drew numbers before."""
    seed = seed * 1_000_003 + parent.index  # a generator mixes its seed well
    layer = _untrained(config, parent.index, seed).to(parent.x.device)
    # Which blocks take over which part, and by how much the router shrinks what they add.
    places = [(layer.shared, i, 1, 1.0) for i in range(config.num_shared_blocks)]
    if layer.routed is not None and layer.router is not None:
        clones = clones_of_families(config.num_routed_blocks, config.num_blocks_per_tok)
        set_router(layer.router, clones, parent.x, torch.Generator().manual_seed(seed))
        rows, gate = layer.route(layer.router(parent.x), parent.context.stream)
        first = 0
        for count in clones:
            own = gate[(rows.blocks >= first) & (rows.blocks < first + count)]
            places.append((layer.routed, first, count, own.mean().item() if len(own) else 1.0))
            first += count
    if method == "random":
        return FittedLayer(layer, [])
    heads = Counter(i for part in parent.parts for i in part.heads)
    neurons = Counter(i for part in parent.parts for i in part.neurons)
    retained = []
    for (stack, first, count, gate_size), part in zip(places, parent.parts, strict=True):
        assert stack is not None
        share = Share(parent.dense, part, heads, neurons, len(parent.parts))
        rank = stack.thin_in.shape[1]
        bases = svd_bases(share, rank) if method == "svd" else pca_bases(parent.moment(), rank)
        project(stack, slice(first, first + count), share, bases)
        stack.thin_out[first : first + count] /= gate_size
        retained.append(bases.retained)
    return FittedLayer(layer, retained)


def _untrained(config: MoLConfig, index: int, seed: int) -> MoLLayer:
    """Layer `index` of an untrained model, float32 on the CPU."""
    alone = copy.deepcopy(config)
    alone.vocab_size, alone.num_hidden_layers = 1, 1
    alone.layer_kinds = [config.layer_kinds[index]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = MoLModel(alone).layers[0]
    assert isinstance(layer, MoLLayer)
    return layer
