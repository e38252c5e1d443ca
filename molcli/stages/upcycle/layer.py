"""One dense layer becomes one Mixture of Layers layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from molcli.config.sections import UpcycleConfig
from molcli.maths.bases import square_roots
from molcli.maths.clusters import cosine_kmeans
from molcli.maths.partition import Part
from molcli.model.chunks import Chunks
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import DenseLayer, MoLLayer, ThinBlocks
from molcli.model.router import Router
from molcli.stages.upcycle.fit import Piece, Task, fit_blocks, refit_blocks
from molcli.stages.upcycle.teacher import Teacher

# Logits of a token's own cluster, where the centroid equals the token.
ROUTER_SCALE = 10.0
# Lets a family with fewer clones win ties, so that a token whose cluster has no clone there still
# visits every family.
TIE_BREAK = 1e-3


@dataclass(frozen=True)
class FittedLayer:
    """A converted layer. retained: reading energy that each family's thin_in retains, the shared
    blocks first. parent, student: (n, d_model), the residuals after it, where the fit made them."""

    layer: MoLLayer
    retained: list[float]
    parent: Tensor | None = None
    student: Tensor | None = None


@dataclass(frozen=True)
class _Family:
    """Blocks of a stack, from number `first` on, that share a part and are fitted together."""

    stack: ThinBlocks
    first: int
    blocks: ThinBlocks
    part: Part
    task: Task

    def store(self) -> None:
        """Puts what was fitted into the stack."""
        for name, own in self.blocks.named_parameters():
            self.stack.get_parameter(name)[self.first : self.first + len(own)] = own


@torch.no_grad()
def copy_layer(config: MoLConfig, index: int, parent: DenseLayer) -> FittedLayer:
    """The parent's layer as the one full-width block of a Mixture of Layers layer: exact."""
    with torch.device("meta"):
        layer = MoLLayer(config, index)
    layer.load_state_dict(copied_tensors(parent.state_dict()), assign=True)
    return FittedLayer(layer.requires_grad_(False), [1.0])


def copied_tensors(parent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `copy_layer`, of those of a dense layer, in their dtype."""
    norm = parent["block.input_norm"]
    eye = torch.eye(norm.shape[-1], dtype=norm.dtype, device=norm.device)[None]
    thin = {"shared.thin_in": eye, "shared.thin_out": eye.clone()}
    return thin | {f"shared.{name}": tensor for name, tensor in parent.items()}


@torch.no_grad()
def fit_layer(
    config: MoLConfig,
    index: int,
    parts: list[Part],
    teacher: Teacher,
    x: Tensor,
    moment: Tensor,
    options: UpcycleConfig,
    generator: torch.Generator,
) -> FittedLayer:
    """Fits a layer so that the student's residual becomes the parent's, past errors included.

    x: (n, d_model), the student's residual before the layer. Blocks are fitted one family after
    another, each to what the families before it leave; then twice, on the way back and forth, to
    what all others leave.
    """
    layer, chunks = MoLLayer(config, index).to(x.device), teacher.chunks
    # What counts in the end passes a norm: an error matters relative to its residual's size.
    importance = [teacher.output[c.tokens].square().mean(-1).rsqrt() for c in chunks]
    task = Task(
        teacher=teacher,
        x=x,
        after=x.clone(),
        moment_roots=square_roots(moment),
        importance=torch.cat(importance),
        pieces=[
            Piece(c, c.context.dense_rows, torch.ones(c.tokens.stop - c.tokens.start).to(x))
            for c in chunks
        ],
        penalty=options.ridge,
        shrinkage=0.0,
    )
    families = []
    if layer.shared is not None:
        spec = replace(config.shared_spec(), num_blocks=1)
        for i, part in enumerate(parts[: config.num_shared_blocks]):
            families.append(_Family(layer.shared, i, ThinBlocks(spec, config), part, task))
    if layer.routed is not None and layer.router is not None:
        clones = clones_of_families(config.num_routed_blocks, config.num_blocks_per_tok)
        set_router(layer.router, clones, x, generator)
        first, routed = 0, parts[config.num_shared_blocks :]
        of_family = _routed_pieces(layer, clones, x, chunks)
        for count, part, pieces in zip(clones, routed, of_family, strict=True):
            spec = replace(config.routed_spec(index), num_blocks=count)
            own = replace(task, pieces=pieces, shrinkage=options.shrinkage)
            families.append(_Family(layer.routed, first, ThinBlocks(spec, config), part, own))
            first += count
    retained = [fit_blocks(one.blocks.to(x.device), one.part, one.task) for one in families]
    for one in [*families[-2::-1], *families[1:]]:  # the one before has seen all others
        refit_blocks(one.blocks, one.part, one.task)
    for one in families:
        one.store()
    return FittedLayer(layer, retained, teacher.output, task.after)


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
            pieces.append(Piece(chunk, rows.of_blocks(first, count), gate[own]))
        yield pieces
        first += count


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
