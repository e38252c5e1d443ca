"""Turn one dense layer into a sliced layer: its mixer as it is, its neurons divided into slices.

Inputs: the parent's layer, and the residuals (n, d_model) of parent and student before it. Outputs:
a `SlicedLayer`, and both residuals after it.

The tokens are clustered by what the layer's FFN reads. The shared slice gets the neurons that write
most over all tokens; each routed slice gets, of the rest, those that write most over the tokens of
its own cluster, so that slices may share neurons. Then what shared and routed slices write is
refitted together by least squares, so that the student's residual becomes the parent's.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from molcli.fitting.chunks import Chunk
from molcli.fitting.layer import LEAST_ENERGY, ROUTER_SCALE, FittedLayer
from molcli.fitting.residuals import Residuals
from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.packed_rows import PackedRows
from molcli.maths.clusters import even_kmeans
from molcli.maths.least_squares import arrow_ridge, ridge
from molcli.maths.moments import Sample, regression_moments, unit_rms
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import DenseLayer, SlicedLayer


@torch.no_grad()
def fit_sliced_layer(
    config: MoLConfig,
    index: int,
    dense: DenseLayer,
    residuals: Residuals,
    penalty: float,
    generator: torch.Generator,
) -> FittedLayer:
    """Fit a sliced layer.

    Args:
        config: of the converted model; a token visits at most one routed slice.
        index: of the layer.
        dense: the parent's layer, float32.
        residuals: before the layer; changed to those after it.
        penalty: of the refit's distance from the parent's own weights, relative to the mean energy
            of a neuron.
        generator: for the clusters.
    """
    layer = SlicedLayer(config, config.layer_mixers[index], index)
    layer.to(residuals.student.device).requires_grad_(False)
    own = layer.block.state_dict()
    inherited = {n: x for n, x in dense.block.state_dict().items() if not n.startswith("mlp.")}
    layer.block.load_state_dict(own | inherited)
    fit = _SliceFit(layer, dense, residuals)
    if layer.router is not None:
        fit.set_router(generator)
    retained = fit.choose_neurons()
    fit.refit(penalty)
    residuals.student = residuals.chunks.run(layer, residuals.student)
    residuals.parent = fit.parent_after
    return FittedLayer(layer, [retained])


class _SliceFit:
    """The fit of one layer, step by step, a chunk of tokens at a time.

    Attributes:
        middle: (n, d_model), the student's residual after the mixer.
        parent_after: (n, d_model), the parent's residual after the layer.
    """

    def __init__(self, layer: SlicedLayer, dense: DenseLayer, residuals: Residuals) -> None:
        self.layer, self.dense, self.residuals = layer, dense, residuals
        self.parent_after = residuals.chunks.run(dense, residuals.parent)
        self.middle = torch.empty_like(residuals.student)
        for chunk in residuals.chunks:
            self.middle[chunk.tokens] = _after_mixer(layer, residuals.student, chunk)

    def set_router(self, generator: torch.Generator) -> None:
        """Route each cluster of tokens to one slice: by what the FFN reads, the residual after the
        mixer at unit mean square times the weight of the norm."""
        router, norm = self.layer.router, self.layer.block.post_norm
        assert router is not None
        weight = 1.0 if norm is None else norm[0]
        read = unit_rms(self.middle) * weight
        centroids, offsets = even_kmeans(read, len(router.weight), generator)
        scale = ROUTER_SCALE / read.square().sum(-1).mean().clamp(min=LEAST_ENERGY)
        router.weight.copy_(centroids * weight * scale)
        router.correction_bias.copy_((offsets - offsets.mean()) * scale)

    def choose_neurons(self) -> float:
        """Copy neurons of the parent into the slices.

        Returns:
            What the neurons of a token's slices write, over what all of the parent's neurons do.
        """
        mlp, layer = self.dense.block.mlp, self.layer
        size = mlp.down_proj[0].square().sum(0)  # (d_ff,)
        count = 1 if layer.router is None else len(layer.router.weight)
        energy = size.new_zeros(count, len(size), dtype=torch.float64)
        for chunk in self.residuals.chunks:
            rows = self._rows(chunk)
            hidden = mlp.hidden(self._read(chunk), chunk.context.dense_rows)
            of_rows = rows.gather((hidden * self._target(chunk)[1]).square())
            begin = 0
            for block, end in enumerate(rows.offsets.tolist()):
                energy[block] += of_rows[begin:end].sum(0, dtype=torch.float64)
                begin = end
        energy *= size
        shared = _largest(energy.sum(0), layer.block.mlp.up_proj.shape[1])
        _copy_neurons(layer.block.mlp.state_dict(), mlp.state_dict(), shared[None])
        kept, left = energy[:, shared].sum(), energy.clone()
        left[:, shared] = -1.0
        if layer.slices is not None:
            own = torch.stack([_largest(row, layer.slices.up_proj.shape[1]) for row in left])
            _copy_neurons(layer.slices.state_dict(), mlp.state_dict(), own)
            kept += left.gather(1, own).clamp(min=0).sum()
        return float(kept / energy.sum().clamp(min=LEAST_ENERGY))

    def refit(self, penalty: float) -> None:
        """Refit what the slices write, as a change of the parent's own weights."""
        layer, shared = self.layer, self.layer.block.mlp
        gram, cross = regression_moments(self._samples(), 0.0)
        if layer.slices is None:
            shared.down_proj.add_(ridge(gram, cross, penalty))
            return
        first, rest = arrow_ridge(gram, cross, shared.up_proj.shape[1], penalty)
        shared.down_proj.add_(first)
        layer.slices.down_proj.add_(rest)

    def _samples(self) -> Iterator[Sample]:
        """Neurons of shared and own slice, and what the slices leave of the target, by slice."""
        layer = self.layer
        for chunk in self.residuals.chunks:
            read, rows, dense_rows = self._read(chunk), self._rows(chunk), chunk.context.dense_rows
            target, weight = self._target(chunk)
            features = layer.block.mlp.hidden(read, dense_rows)
            error = target - features @ layer.block.mlp.down_proj[0].mT
            features, error, weight = (rows.gather(x) for x in (features, error, weight))
            if layer.slices is not None:
                own = layer.slices.hidden(rows.gather(read), rows)
                error = error - grouped_linear(own, layer.slices.down_proj, rows)
                features = torch.cat([features, own], dim=1)
            yield features * weight, error * weight, rows.offsets

    def _rows(self, chunk: Chunk) -> PackedRows:
        """The chunk's tokens by slice; all of them in one where nothing is routed."""
        if self.layer.router is None:
            return chunk.context.dense_rows
        routing = self.layer.router(self.middle[chunk.tokens])
        return self.layer.rows_of_slices(routing, chunk.context.stream)

    def _read(self, chunk: Chunk) -> Tensor:
        """What the student's FFN reads, (tokens, d_model)."""
        block = self.layer.block
        return block.norm(self.middle[chunk.tokens], block.post_norm, chunk.context.dense_rows)

    def _target(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return what the slices should write, (tokens, d_model), and the weight of each token.

        They should write all that the student's residual lacks; where a norm follows, which no sum
        can be taken through, what the parent's FFN writes. The model normalises its last residual,
        so that an error matters relative to its token's size.
        """
        block, rows = self.dense.block, chunk.context.dense_rows
        size = self.parent_after[chunk.tokens]
        target = size - self.middle[chunk.tokens]
        if block.mlp_out_norm is not None:
            middle = _after_mixer(self.dense, self.residuals.parent, chunk)
            size = target = block.mlp(block.norm(middle, block.post_norm, rows), rows)
        return target, size.square().mean(-1, keepdim=True).clamp(min=LEAST_ENERGY).rsqrt()


def _after_mixer(layer: DenseLayer | SlicedLayer, x: Tensor, chunk: Chunk) -> Tensor:
    """The residual of a chunk after attention, (tokens, d_model). x: (n, d_model)."""
    before = x[chunk.tokens]
    return before + layer.block.mix(before, chunk.context.blocks(chunk.context.dense_rows))


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values, (count,), ascending."""
    return values.topk(count).indices.sort().values


def _copy_neurons(to: dict[str, Tensor], parent: dict[str, Tensor], neurons: Tensor) -> None:
    """Copy neurons of a dense FFN, (B, count) indices, into B slices, in place."""
    for name, tensor in to.items():
        source = parent[name][0]
        tensor.copy_(source[:, neurons].movedim(0, 1) if name == "down_proj" else source[neurons])
