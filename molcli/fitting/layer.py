"""One dense layer becomes one Mixture of Layers layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from molcli.config.sections import UpcycleConfig
from molcli.fitting.chunks import Chunks
from molcli.fitting.partition import Part
from molcli.fitting.streams import Streams
from molcli.fitting.targets import Teacher
from molcli.fitting.thin_blocks import Family, Goal, Piece, Task
from molcli.maths.bases import square_roots
from molcli.maths.clusters import cosine_kmeans
from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.layers import DenseLayer, MoLLayer, ThinBlocks
from molcli.model.routing.router import Router

# Logits of a token's own cluster, where the centroid equals the token.
ROUTER_SCALE = 10.0
# Lets a family with fewer clones win ties, so that a token whose cluster has no clone there still
# visits every family.
TIE_BREAK = 1e-3


@dataclass(frozen=True)
class FittedLayer:
    """A converted layer. retained: reading energy that each family's thin_in retains, the shared
    blocks first."""

    layer: MoLLayer
    retained: list[float]


@torch.no_grad()
def copy_layer(config: MoLConfig, index: int, parent: DenseLayer) -> FittedLayer:
    """The parent's layer as the one full-width block of a Mixture of Layers layer: exact."""
    with torch.device("meta"):
        layer = MoLLayer(config, config.layer_mixers[index], index)
    layer.load_state_dict(copied_tensors(parent.state_dict()), assign=True)
    return FittedLayer(layer.requires_grad_(False), [1.0])


def copied_tensors(parent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `copy_layer`, of those of a dense layer, in their dtype."""
    weight = parent["block.mixer.o_proj"]
    eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)[None]
    thin = {"shared.thin_in": eye, "shared.thin_out": eye.clone()}
    return thin | {f"shared.{name}": tensor for name, tensor in parent.items()}


@torch.no_grad()
def fit_layer(
    config: MoLConfig,
    index: int,
    parts: list[Part],
    dense: DenseLayer,
    streams: Streams,
    moment: Tensor,
    options: UpcycleConfig,
    generator: torch.Generator,
) -> FittedLayer:
    """Fits a layer so that the student's residual becomes the parent's, past errors included.

    streams: before the layer, and then past it; the parent's residual is worked on in place, unless
    it is the student's, too. Blocks learn to read the parent's way, and then, one family after
    another, to write what the families before them leave; then twice, on the way back and forth,
    what all others leave.
    """
    x, chunks, same = streams.student, streams.chunks, streams.student is streams.parent
    teacher = Teacher(dense, x.clone() if same else streams.parent, chunks)
    layer = MoLLayer(config, config.layer_mixers[index], index).to(x.device).requires_grad_(False)
    task = Task(
        teacher=teacher,
        x=x,
        moment_roots=square_roots(moment),
        pieces=[
            Piece(c, c.context.dense_rows, torch.ones(c.tokens.stop - c.tokens.start).to(x))
            for c in chunks
        ],
        penalty=options.ridge,
        shrinkage=0.0,
    )
    shared, routed = parts[: config.num_shared_blocks], parts[config.num_shared_blocks :]
    families = []
    if layer.shared is not None:
        spec = replace(config.shared_spec(index), num_blocks=1)
        for i, part in enumerate(shared):
            families.append(Family(_blocks(layer.shared, i, spec, config), part, task))
    if layer.routed is not None and layer.router is not None:
        clones = clones_of_families(config.num_routed_blocks, config.num_blocks_per_tok)
        set_router(layer.router, clones, x, generator)
        first = 0
        of_family = _routed_pieces(layer, clones, x, chunks)
        for count, part, pieces in zip(clones, routed, of_family, strict=True):
            spec = replace(config.routed_spec(config.layer_mixers[index], index), num_blocks=count)
            task = replace(task, pieces=pieces, shrinkage=options.shrinkage)
            families.append(Family(_blocks(layer.routed, first, spec, config), part, task))
            first += count
    teacher.attend()
    goal = _goal(teacher, x)
    for family in families:
        family.write(goal)
    for family in [*families[-2::-1], *families[1:]]:  # the one before has seen all others
        family.rewrite(goal)
    teacher.feed()
    streams.parent, streams.student = teacher.x, torch.sub(teacher.x, goal.left, out=goal.left)
    return FittedLayer(layer, [family.retained for family in families])


def _goal(teacher: Teacher, x: Tensor) -> Goal:
    """Before anything is written. x: (n, d_model), the student's residual before the layer."""
    goal = Goal(torch.empty_like(x), x.new_empty(len(x)))
    for chunk in teacher.chunks:
        output = teacher.x[chunk.tokens] + teacher.fed(chunk)
        # What counts in the end passes a norm: an error matters relative to its residual's size.
        goal.importance[chunk.tokens] = output.square().mean(-1).rsqrt()
        goal.left[chunk.tokens] = output - x[chunk.tokens]
    return goal


def _routed_pieces(
    layer: MoLLayer, clones: list[int], x: Tensor, chunks: Chunks
) -> Iterator[list[Piece]]:
    """By family, the rows that the router sends to it."""
    assert layer.router is not None
    routed = [(c, *layer.route(layer.router(x[c.tokens]), c.context.stream)) for c in chunks]
    first = 0
    for count in clones:
        pieces = []
        for chunk, rows, gate in routed:
            own = (rows.blocks >= first) & (rows.blocks < first + count)
            pieces.append(Piece(chunk, rows.block_range(first, count), gate[own]))
        yield pieces
        first += count


def _blocks(stack: ThinBlocks, first: int, spec: BlockSpec, config: MoLConfig) -> ThinBlocks:
    """spec.num_blocks blocks of a stack, which share its memory."""
    with torch.device("meta"):
        blocks = ThinBlocks(spec, config)
    own = slice(first, first + spec.num_blocks)
    views = {name: tensor[own] for name, tensor in stack.state_dict().items()}
    blocks.load_state_dict(views, strict=True, assign=True)
    return blocks.requires_grad_(False)


def clones_of_families(routed: int, top_k: int) -> list[int]:
    """Blocks in each of top_k families; the first ones get the blocks that are left over."""
    return [routed // top_k + (i < routed % top_k) for i in range(top_k)]


def set_router(router: Router, clones: list[int], x: Tensor, generator: torch.Generator) -> None:
    """Every cluster of tokens gets one clone of each family.

    The clones of a cluster share their router row, hence their logits: the top_k of a token are
    its cluster's clones, with equal weights, until training tells them apart.
    """
    centroids = cosine_kmeans(x, max(clones), generator)
    scale = ROUTER_SCALE / x.shape[1] ** 0.5
    router.weight.copy_(torch.cat([centroids[:count] for count in clones]) * scale)
    scarce = [count < max(clones) for count in clones]
    bias = [
        TIE_BREAK * few for few, count in zip(scarce, clones, strict=True) for _ in range(count)
    ]
    router.correction_bias.copy_(torch.tensor(bias))
