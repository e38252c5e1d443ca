"""Starts without a fit, in the same shape: what a fitted conversion has to beat.

"random": thin blocks as `molcli init` draws them. "svd": the weights alone, truncated; thin_in
spans what a block's heads and neurons read most, thin_out what they write most, turned so that
heads write where the FFN reads. "pca": both are the leading directions of the calibration residual.
The matrices in between are the parent's, projected: at full width, the last two are the parent.

All route alike, by clusters of the parent's own residual, or of its embeddings where there is no
text; the clones of a family start equal.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molcli.fitting.calibration import Calibration
from molcli.fitting.layer import FittedLayer, clones_of_families, set_router
from molcli.fitting.partition import Part
from molcli.fitting.projection import FoldedWeights, pca_bases, project, svd_bases
from molcli.maths.moments import CHUNK_ROWS
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import DenseLayer, MoLLayer
from molcli.model.modeling_mol import MoLModel

Method = Literal["random", "svd", "pca"]
METHODS: tuple[Method, ...] = ("random", "svd", "pca")


def methods_for(config: MoLConfig) -> tuple[Method, ...]:
    """Those that can start this model. "svd" and "pca" project linear maps, and a norm behind
    attention and FFN is none: thin blocks have no such norm."""
    return ("random",) if config.output_norms else METHODS


@dataclass(frozen=True)
class ParentLayer:
    """What baselines are made from: layer `index` of the parent.

    dense: None is enough for "random". parts: the shares of the layer, shared blocks first, then
    one per routed family. x: (n, d_model), the parent's residual before the layer, on the text to
    fit on; without text, embeddings.
    """

    index: int
    dense: DenseLayer | None
    parts: list[Part]
    x: Tensor
    calibration: Calibration | None

    def moment(self) -> Tensor:
        """(d_model, d_model) float64, of the residual at unit rms."""
        assert self.calibration is not None
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
        first = 0
        for count, gate in zip(clones, _mean_gates(layer, clones, parent.x), strict=True):
            places.append((layer.routed, first, count, gate))
            first += count
    if method == "random":
        return FittedLayer(layer, [])
    assert parent.dense is not None
    heads = Counter(i for part in parent.parts for i in part.heads)
    neurons = Counter(i for part in parent.parts for i in part.neurons)
    retained = []
    for (stack, first, count, gate_size), part in zip(places, parent.parts, strict=True):
        assert stack is not None
        share = FoldedWeights(parent.dense, part, heads, neurons, len(parent.parts))
        rank = stack.thin_in.shape[1]
        bases = svd_bases(share, rank) if method == "svd" else pca_bases(parent.moment(), rank)
        project(stack, slice(first, first + count), share, bases)
        stack.thin_out[first : first + count] /= gate_size
        retained.append(bases.retained)
    return FittedLayer(layer, retained)


def _mean_gates(layer: MoLLayer, clones: list[int], x: Tensor) -> list[float]:
    """By family, the mean weight of its blocks' outputs on the tokens x that they see; 1 for none.

    Blocks that see all tokens have weight 0 on those that did not choose them.
    """
    assert layer.router is not None
    sums, seen = (x.new_zeros(sum(clones), dtype=torch.float64) for _ in range(2))
    for part in x.split(CHUNK_ROWS):
        routing = layer.router(part)
        weights = torch.zeros_like(routing.logits).scatter(1, routing.blocks, routing.weights)
        sums += weights.double().sum(0) / layer.top_k
        seen += torch.bincount(routing.blocks.flatten(), minlength=len(seen))
    if not layer.restrict_attention:
        seen.fill_(len(x))
    families = zip(sums.split(clones), seen.split(clones), strict=True)
    return [(own.sum() / n.sum()).item() if n.any() else 1.0 for own, n in families]


def _untrained(config: MoLConfig, index: int, seed: int) -> MoLLayer:
    """Layer `index` of an untrained model, float32 on the CPU."""
    alone = copy.deepcopy(config)
    alone.vocab_size, alone.num_hidden_layers = 1, 1
    alone.layer_structures = [config.layer_structures[index]]
    alone.layer_mixers = [config.layer_mixers[index]]
    if config.sliding_windows is not None:
        alone.sliding_windows = [config.sliding_windows[index]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = MoLModel(alone).layers[0]
    assert isinstance(layer, MoLLayer)
    return layer
