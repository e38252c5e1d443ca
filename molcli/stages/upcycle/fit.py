"""Fitting thin blocks to what they should add, by least squares on the student's own stream.

The order inside a block follows the data: what it reads, its projections, its heads' output, its
neurons, what it writes. Every matrix is refitted on the features that the matrices before it really
produce: a truncated parent matrix alone is no better than leaving the layer out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.rows import Rows
from molcli.maths.bases import reading_basis
from molcli.maths.moments import grouped_cross_moment
from molcli.maths.partition import Part
from molcli.maths.refit import aligning_turn, least_squares_left, reduced_rank, ridge
from molcli.model.context import Context
from molcli.model.deltanet_start import Site, set_gated_deltanet
from molcli.model.gated_deltanet import StackedGatedDeltaNet
from molcli.model.layers import ThinBlocks
from molcli.stages.upcycle.teacher import Teacher

MAX_NORM_WEIGHT = 100.0  # coordinates that hardly vary are not blown up without bound


@dataclass(frozen=True)
class Task:
    """What a family of blocks, which share one part of the parent, should learn.

    x: (n, d_model), the student's residual. target: (n, d_model), what the blocks should add.
    moment_roots: `square_roots` of the unit-rms residual's second moment. importance: (n,), weight
    of each token's error. rows: the tokens of each block; gate: (M,), the weight of each row's
    output. penalty, shrinkage: of the regressions (`ridge`, `grouped_cross_moment`).
    """

    teacher: Teacher
    context: Context
    x: Tensor
    target: Tensor
    moment_roots: tuple[Tensor, Tensor]
    importance: Tensor
    rows: Rows
    gate: Tensor
    penalty: float
    shrinkage: float

    def regress(self, features: Tensor, wanted: Tensor) -> Tensor:
        """features: (M, p), wanted: (M, q) -> (B, q, p) float64, a ridge regression per block."""
        return ridge(*self.moments(features, wanted), self.penalty)

    def moments(self, features: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """(B, p, p) and (B, p, q) float64."""
        offsets, shrinkage = self.rows.offsets, self.shrinkage
        return (
            grouped_cross_moment(features, features, offsets, shrinkage),
            grouped_cross_moment(features, wanted, offsets, shrinkage),
        )


@torch.no_grad()
def fit_blocks(blocks: ThinBlocks, part: Part, task: Task) -> tuple[Tensor, float]:
    """Sets every parameter of the blocks.

    Returns what they add to the residual (n, d_model), and the share of the parent's reading
    energy that thin_in retains.
    """
    rows, block = task.rows, blocks.block
    rank = blocks.thin_in.shape[1]
    basis = reading_basis(task.teacher.reading_gram(part), *task.moment_roots, rank)
    blocks.thin_in.copy_(basis.projection)
    # After the norms every thin coordinate has the same size, whatever its share of the residual.
    scale = (basis.variances.mean() / basis.variances).clamp(max=MAX_NORM_WEIGHT**2).sqrt()
    block.input_norm.copy_(scale)
    block.post_norm.copy_(scale)
    thin = grouped_linear(rows.gather(task.x), blocks.thin_in, rows)
    heads = _fit_heads(blocks, part, task, thin)

    # A first output projection gives the FFN what it reads in the parent: the residual with the
    # whole layer's attention added, as far as this block's heads can tell.
    attention = grouped_linear(rows.gather(task.teacher.attention), blocks.thin_in, rows)
    first_out = task.regress(heads, attention)
    block.mixer.o_proj.copy_(first_out)
    neurons = _fit_neurons(blocks, part, task, thin, heads)

    # What to write: reduced-rank regression of the target on heads and neurons together.
    importance = rows.gather(task.importance)[:, None]
    weight = task.gate[:, None] * importance
    wanted = rows.gather(task.target) * importance
    gram, cross = task.moments(torch.cat([heads, neurons], dim=1) * weight, wanted)
    write, mixing = reduced_rank(gram, cross, blocks.thin_out.shape[2], task.penalty)
    # The thin coordinates are free up to a turn; take the one in which heads write what the
    # FFN is to read, and in which thin_in undoes thin_out where that leaves a choice. A general
    # map would fit better on paper, and blow up rounding errors by the inverse it puts here.
    of_heads = mixing[..., : heads.shape[1]]
    head_gram = gram[..., : heads.shape[1], : heads.shape[1]]
    turn, size = aligning_turn(of_heads, first_out, head_gram, basis.projection @ write)
    blocks.thin_out.copy_(write @ turn.mT / size)
    block.mixer.o_proj.copy_(size * turn @ of_heads)

    # The output projection moved, so the neurons see other inputs: refit them, then their output.
    neurons = _fit_neurons(blocks, part, task, thin, heads)
    from_heads = grouped_linear(heads, block.mixer.o_proj, rows)
    left = wanted - grouped_linear(from_heads * weight, blocks.thin_out, rows)
    full = task.regress(neurons * weight, left)
    block.mlp.down_proj.copy_(least_squares_left(blocks.thin_out.double(), full))

    delta = from_heads + grouped_linear(neurons, block.mlp.down_proj, rows)
    added = grouped_linear(delta * task.gate[:, None], blocks.thin_out, rows)
    return rows.scatter(added, task.x.shape[0]), basis.retained


def _fit_heads(blocks: ThinBlocks, part: Part, task: Task, thin: Tensor) -> Tensor:
    """Fits q, k and v to the parent's, on what the block reads. Returns (M, heads * head_dim)."""
    mixer, rows, context = blocks.block.mixer, task.rows, task.context
    read = blocks.block.norm(thin, blocks.block.input_norm, rows)
    kv_heads = part.kv_heads
    if isinstance(mixer, StackedGatedDeltaNet):  # a key-value head for every query head
        kv_heads = tuple(h for h in kv_heads for _ in range(len(part.heads) // len(kv_heads)))
    one = torch.ones_like(read[:, :1])
    for name, heads in (("q", part.heads), ("k", kv_heads), ("v", kv_heads)):
        wanted = rows.gather(task.teacher.projected(name, heads))
        bias = getattr(mixer, f"{name}_bias", None)
        fitted = task.regress(read if bias is None else torch.cat([read, one], dim=1), wanted)
        getattr(mixer, f"{name}_proj").copy_(fitted[..., : read.shape[1]])
        if bias is not None:
            bias.copy_(fitted[..., -1])
    if isinstance(mixer, StackedGatedDeltaNet):
        wanted = rows.gather(task.teacher.heads(part.heads))
        set_gated_deltanet(mixer, Site(read, rows, context), wanted, task.regress)
    else:
        for name in ("q_norm", "k_norm"):
            if getattr(mixer, name) is not None:
                getattr(mixer, name).copy_(getattr(task.teacher.mixer, name))
        if mixer.o_bias is not None:
            mixer.o_bias.zero_()
    out: Tensor = mixer.heads(read, rows, context.rotary, context.stream, None)
    return out.flatten(1)


def _fit_neurons(blocks: ThinBlocks, part: Part, task: Task, thin: Tensor, heads: Tensor) -> Tensor:
    """Fits gate and up to the parent's, on what the block's FFN reads. Returns (M, d_ff)."""
    block, rows = blocks.block, task.rows
    middle = thin + grouped_linear(heads, block.mixer.o_proj, rows)
    read = block.norm(middle, block.post_norm, rows)
    for name in ("gate", "up"):
        wanted = rows.gather(task.teacher.neuron_inputs(name, part.neurons))
        getattr(block.mlp, f"{name}_proj").copy_(task.regress(read, wanted))
    return block.mlp.neurons(read, rows)
