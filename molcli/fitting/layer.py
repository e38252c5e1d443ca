"""Turn one dense layer into one Mixture of Layers layer.

Inputs: the parent's layer, the residuals (n, d_model) of parent and student before it, the second
moment of what it reads, and the `BlockPart` of each group of blocks. Outputs: a `FittedLayer`, and
both residuals after the layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from molcli.config.sections import UpcycleConfig
from molcli.fitting.chunks import Chunks
from molcli.fitting.partition import BlockPart
from molcli.fitting.residuals import Residuals
from molcli.fitting.targets import LayerTargets
from molcli.fitting.thin_blocks import BlockGroup, FitData, GroupRows, OutputError
from molcli.maths.bases import square_roots
from molcli.maths.clusters import cosine_kmeans
from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.layers import ConvertedLayer, DenseLayer, MoLLayer, ThinBlocks
from molcli.model.routing.router import Router

# Logit of a token's own cluster, where the centroid equals the token.
ROUTER_SCALE = 10.0
# Added to the groups with fewer clones, so that they win ties: a token whose cluster has no clone
# in such a group still visits every group.
LEAST_ENERGY = 1e-20  # of a token; the square of its weight is then finite in float32
TIE_BREAK = 1e-3


@dataclass(frozen=True)
class FittedLayer:
    """A converted layer. retained: the fraction of reading energy that thin_in of each group
    retains, shared blocks first; empty where thin_in is random. Of a sliced layer, the fraction of
    what all neurons write that a token's slices write."""

    layer: ConvertedLayer
    retained: list[float]


@torch.no_grad()
def copy_layer(config: MoLConfig, index: int, parent: DenseLayer) -> FittedLayer:
    """Use the parent's layer as the only block, at full width, of a MoL layer. Exact."""
    with torch.device("meta"):
        layer = MoLLayer(config, config.layer_mixers[index], index)
    layer.load_state_dict(copied_tensors(parent.state_dict()), assign=True)
    return FittedLayer(layer.requires_grad_(False), [1.0])


def copied_tensors(parent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of `copy_layer` from those of a dense layer, in the same dtype."""
    weight = parent["block.mixer.o_proj"]
    eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)[None]
    thin = {"shared.thin_in": eye, "shared.thin_out": eye.clone()}
    return thin | {f"shared.{name}": tensor for name, tensor in parent.items()}


@torch.no_grad()
def fit_layer(
    config: MoLConfig,
    index: int,
    parts: list[BlockPart],
    dense: DenseLayer,
    residuals: Residuals,
    moment: Tensor,
    options: UpcycleConfig,
    generator: torch.Generator,
) -> FittedLayer:
    """Fit a layer so that the student's residual becomes the parent's, earlier errors included.

    All groups are fitted to read what the parent reads. Then one group after another is fitted to
    write what the groups before it leave; and twice more, backwards and forwards, what all others
    leave.

    Args:
        config: of the converted model.
        index: of the layer.
        parts: of the dense layer, from `block_parts`.
        dense: the parent's layer, float32.
        residuals: before the layer; changed to those after it. The parent's is changed in place,
            unless it is the student's, too.
        moment: (d_model, d_model) float64, second moment of the unit-rms residual.
        options: ridge and shrinkage are used.
        generator: for the clusters of the router.
    """
    x, chunks = residuals.student, residuals.chunks
    parent = x.clone() if residuals.student is residuals.parent else residuals.parent
    targets = LayerTargets(dense, parent, chunks)
    layer = MoLLayer(config, config.layer_mixers[index], index).to(x.device).requires_grad_(False)
    data = FitData(
        targets=targets,
        x=x,
        moment_roots=square_roots(moment),
        rows=[
            GroupRows(c, c.context.dense_rows, torch.ones(c.tokens.stop - c.tokens.start).to(x))
            for c in chunks
        ],
        penalty=options.ridge,
        shrinkage=0.0,
    )
    spec = replace(config.shared_spec(index), num_blocks=1)
    groups = _shared_groups(layer, config, spec, parts[: config.num_shared_blocks], data)
    if layer.router is not None:
        clones = clones_per_group(config.num_routed_blocks, config.num_blocks_per_tok)
        set_router(layer.router, clones, x, generator)
        data = replace(data, shrinkage=options.shrinkage)
        spec = config.routed_spec(config.layer_mixers[index], index)
        routed = parts[config.num_shared_blocks :]
        groups += _routed_groups(layer, config, spec, clones, routed, data, chunks)
    for group in groups:
        group.fit_reading()
    targets.add_attention()
    error = _initial_error(targets, x)
    for group in groups:
        group.fit_writing(error)
    for group in [*groups[-2::-1], *groups[1:]]:  # the last fitted group has seen all others
        group.refit_writing(error)
    targets.add_ffn()
    residuals.parent = targets.x
    residuals.student = torch.sub(targets.x, error.error, out=error.error)
    return FittedLayer(layer, [group.retained for group in groups])


def clones_per_group(num_routed: int, top_k: int) -> list[int]:
    """Divide the routed blocks into top_k groups; the first ones get one more where they must."""
    return [num_routed // top_k + (i < num_routed % top_k) for i in range(top_k)]


def set_router(router: Router, clones: list[int], x: Tensor, generator: torch.Generator) -> None:
    """Route every cluster of tokens to one clone of each group.

    The clones of a cluster have the same router row, hence the same logits: the top_k of a token
    are its cluster's clones, with equal weights, until training changes them.

    Args:
        router: changed in place.
        clones: blocks in each group.
        x: (n, d_model), the residual to cluster.
        generator: for the clusters.
    """
    centroids = cosine_kmeans(x, max(clones), generator)
    scale = ROUTER_SCALE / x.shape[1] ** 0.5
    router.weight.copy_(torch.cat([centroids[:count] for count in clones]) * scale)
    scarce = [count < max(clones) for count in clones]
    bias = [
        TIE_BREAK * few for few, count in zip(scarce, clones, strict=True) for _ in range(count)
    ]
    router.correction_bias.copy_(torch.tensor(bias))


def _shared_groups(
    layer: MoLLayer, config: MoLConfig, spec: BlockSpec, parts: list[BlockPart], data: FitData
) -> list[BlockGroup]:
    """Make a group of each shared block. spec: of one of them."""
    if layer.shared is None:
        return []
    return [
        BlockGroup(_view_blocks(layer.shared, i, spec, config), part, data)
        for i, part in enumerate(parts)
    ]


def _routed_groups(
    layer: MoLLayer,
    config: MoLConfig,
    spec: BlockSpec,
    clones: list[int],
    parts: list[BlockPart],
    data: FitData,
    chunks: Chunks,
) -> list[BlockGroup]:
    """Make a group of the clones of each part, with the rows that the router sends them."""
    assert layer.routed is not None
    groups, first = [], 0
    rows_of_groups = _rows_of_groups(layer, clones, data.x, chunks)
    for count, part, rows in zip(clones, parts, rows_of_groups, strict=True):
        blocks = _view_blocks(layer.routed, first, replace(spec, num_blocks=count), config)
        groups.append(BlockGroup(blocks, part, replace(data, rows=rows)))
        first += count
    return groups


def _rows_of_groups(
    layer: MoLLayer, clones: list[int], x: Tensor, chunks: Chunks
) -> Iterator[list[GroupRows]]:
    """The rows that the router sends to each group, by chunk. x: (n, d_model)."""
    assert layer.router is not None
    routed = [(c, *layer.route(layer.router(x[c.tokens]), c.context.stream)) for c in chunks]
    first = 0
    for count in clones:
        found = []
        for chunk, rows, gate in routed:
            own = (rows.blocks >= first) & (rows.blocks < first + count)
            found.append(GroupRows(chunk, rows.block_range(first, count), gate[own]))
        yield found
        first += count


def _view_blocks(stack: ThinBlocks, first: int, spec: BlockSpec, config: MoLConfig) -> ThinBlocks:
    """spec.num_blocks blocks of a stack, as views of its memory."""
    with torch.device("meta"):
        blocks = ThinBlocks(spec, config)
    own = slice(first, first + spec.num_blocks)
    views = {name: tensor[own] for name, tensor in stack.state_dict().items()}
    blocks.load_state_dict(views, strict=True, assign=True)
    return blocks.requires_grad_(False)


def _initial_error(targets: LayerTargets, x: Tensor) -> OutputError:
    """The error of a layer that adds nothing. x: (n, d_model), the student's residual before it."""
    error = OutputError(torch.empty_like(x), x.new_empty(len(x)))
    for chunk in targets.chunks:
        output = targets.x[chunk.tokens] + targets.ffn_output(chunk)
        # The model normalises its last residual: an error matters relative to its token's size.
        # A zero embedding, as that of padding often is, has no size.
        size = output.square().mean(-1).clamp(min=LEAST_ENERGY)
        error.weight[chunk.tokens] = size.rsqrt()
        error.error[chunk.tokens] = output - x[chunk.tokens]
    return error
