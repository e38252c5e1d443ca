"""Fill a Mixture of Layers layer without a fit, in the same shape: the baselines of a fit.

"random": thin blocks as `molcli init` initialises them. "svd": the weights alone, truncated;
thin_in spans what a block's heads and neurons read most, thin_out what they write most, rotated so
that heads write where the FFN reads. "pca": both are the leading directions of the calibration
residual. The matrices in between are the parent's, projected; at full width, the last two are
exact.

All use the same router, from clusters of the parent's own residual, or of its embeddings where
there is no text. The clones of a group start equal.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molcli.fitting.calibration import Calibration
from molcli.fitting.layer import FittedLayer, clones_per_group, set_router
from molcli.fitting.partition import BlockPart
from molcli.fitting.projection import FoldedWeights, pca_bases, project, svd_bases
from molcli.maths.moments import CHUNK_ROWS
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import DenseLayer, MoLLayer, ThinBlocks
from molcli.model.modeling_mol import MoLModel

Method = Literal["random", "svd", "pca"]
METHODS: tuple[Method, ...] = ("random", "svd", "pca")


def methods_for(config: MoLConfig) -> tuple[Method, ...]:
    """Those that can start this model. "svd" and "pca" project linear maps, and a norm behind
    attention and FFN is none: thin blocks have no such norm. Slices are neurons as they are."""
    if config.has_slices:
        return ()
    return ("random",) if config.output_norms else METHODS


@dataclass(frozen=True)
class BaselineInputs:
    """What the baselines of layer `index` are computed from.

    dense: the parent's layer; "random" needs none. parts: of the layer, from `block_parts`.
    x: (n, d_model), the parent's residual before the layer, on the text to fit on; without text,
    embeddings. calibration: needed by "pca".
    """

    index: int
    dense: DenseLayer | None
    parts: list[BlockPart]
    x: Tensor
    calibration: Calibration | None

    def moment(self) -> Tensor:
        """Return the second moment of the unit-rms residual, (d_model, d_model) float64."""
        assert self.calibration is not None
        return self.calibration.moment(self.index).to(self.x.device)


@torch.no_grad()
def baseline_layer(
    method: Method, config: MoLConfig, inputs: BaselineInputs, seed: int
) -> FittedLayer:
    """Build the MoL layer of a method. The result depends on the seed, not on earlier draws."""
    seed = seed * 1_000_003 + inputs.index  # torch mixes the bits of a seed well
    layer = _untrained_layer(config, inputs.index, seed).to(inputs.x.device)
    groups = _groups(layer, config, inputs.x, seed)
    if method == "random":
        return FittedLayer(layer, [])
    assert inputs.dense is not None
    head_counts = Counter(i for part in inputs.parts for i in part.heads)
    neuron_counts = Counter(i for part in inputs.parts for i in part.neurons)
    retained = []
    for group, part in zip(groups, inputs.parts, strict=True):
        weights = FoldedWeights(inputs.dense, part, head_counts, neuron_counts, len(inputs.parts))
        rank = group.stack.thin_in.shape[1]
        bases = svd_bases(weights, rank) if method == "svd" else pca_bases(inputs.moment(), rank)
        project(group.stack, group.blocks, weights, bases)
        group.stack.thin_out[group.blocks] /= group.gate
        retained.append(bases.retained)
    return FittedLayer(layer, retained)


@dataclass(frozen=True)
class _Group:
    """Blocks of a stack that take over one part; gate: the mean factor of their outputs."""

    stack: ThinBlocks
    blocks: slice
    gate: float


def _groups(layer: MoLLayer, config: MoLConfig, x: Tensor, seed: int) -> list[_Group]:
    """Set the router, and return the groups in the order of their parts."""
    groups = []
    if layer.shared is not None:
        shared = range(config.num_shared_blocks)
        groups = [_Group(layer.shared, slice(i, i + 1), 1.0) for i in shared]
    if layer.routed is not None and layer.router is not None:
        clones = clones_per_group(config.num_routed_blocks, config.num_blocks_per_tok)
        set_router(layer.router, clones, x, torch.Generator().manual_seed(seed))
        first = 0
        for count, gate in zip(clones, _mean_gates(layer, clones, x), strict=True):
            groups.append(_Group(layer.routed, slice(first, first + count), gate))
            first += count
    return groups


def _mean_gates(layer: MoLLayer, clones: list[int], x: Tensor) -> list[float]:
    """The mean weight of each group's outputs on the tokens x that its blocks see; 1 without any.

    Blocks that see all tokens have weight 0 on those that did not choose them.
    """
    assert layer.router is not None
    sums, seen = (x.new_zeros(sum(clones), dtype=torch.float64) for _ in range(2))
    for chunk in x.split(CHUNK_ROWS):
        routing = layer.router(chunk)
        weights = torch.zeros_like(routing.logits).scatter(1, routing.blocks, routing.weights)
        sums += weights.double().sum(0) / layer.top_k
        seen += torch.bincount(routing.blocks.flatten(), minlength=len(seen))
    if not layer.restrict_attention:
        seen.fill_(len(x))
    groups = zip(sums.split(clones), seen.split(clones), strict=True)
    return [(own.sum() / n.sum()).item() if n.any() else 1.0 for own, n in groups]


def _untrained_layer(config: MoLConfig, index: int, seed: int) -> MoLLayer:
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
