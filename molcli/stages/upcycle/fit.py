"""Fitting thin blocks to what they should add, by least squares on the student's own stream.

The order inside a block follows the data: what it reads, its projections, its heads' output, its
neurons, what it writes. Every matrix is refitted on the features that the matrices before it really
produce: a truncated parent matrix alone is no better than leaving the layer out.

Of all tokens, only what a block reads and what its heads give are kept; neurons, inputs and targets
are computed anew for each regression, a chunk at a time, and only their moments are summed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.rows import Rows
from molcli.maths.bases import reading_basis
from molcli.maths.moments import Sample, regression_moments
from molcli.maths.partition import Part
from molcli.maths.refit import aligning_turn, least_squares_left, reduced_rank, ridge
from molcli.model.chunks import Chunk
from molcli.model.deltanet_start import Site, set_gated_deltanet
from molcli.model.gated_deltanet import StackedGatedDeltaNet
from molcli.model.layers import ThinBlocks
from molcli.model.reading import reading_gram
from molcli.stages.upcycle.teacher import Teacher

MAX_NORM_WEIGHT = 100.0  # coordinates that hardly vary are not blown up without bound


@dataclass(frozen=True)
class Piece:
    """A chunk's rows of one family. gate: (M,), the weight of each row's output."""

    chunk: Chunk
    rows: Rows
    gate: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """x: (n, ...), of all tokens -> (M, ...)."""
        return self.rows.gather(x[self.chunk.tokens])


@dataclass(frozen=True)
class Task:
    """What a family of blocks, which share one part of the parent, should learn.

    x: (n, d_model), the student's residual before the layer. after: (n, d_model), what it is with
    all that was fitted so far, to become the parent's. moment_roots: `square_roots` of the unit-rms
    residual's second moment. importance: (n,), weight of each token's error. penalty, shrinkage: of
    the regressions (`ridge`, `drawn_together`).
    """

    teacher: Teacher
    x: Tensor
    after: Tensor
    moment_roots: tuple[Tensor, Tensor]
    importance: Tensor
    pieces: list[Piece]
    penalty: float
    shrinkage: float

    def regress(self, samples: Iterator[Sample], through: Tensor | None = None) -> Tensor:
        """(B, q, p) float64, a ridge regression per block.

        through: (q, d), where what is wanted is this map of the samples' `wanted` (M, d).
        """
        gram, cross = self.moments(samples)
        if through is not None:
            cross = cross @ through.double().mT
        return ridge(gram, cross, self.penalty)

    def moments(self, samples: Iterator[Sample]) -> tuple[Tensor, Tensor]:
        """`regression_moments`, shrunk."""
        return regression_moments(samples, self.shrinkage)


@torch.no_grad()
def fit_blocks(blocks: ThinBlocks, part: Part, task: Task) -> float:
    """Sets every parameter of the blocks, and adds what they add to `task.after`.

    Returns the share of the parent's reading energy that thin_in retains.
    """
    block, teacher = blocks.block, task.teacher
    rank = blocks.thin_in.shape[1]
    basis = reading_basis(reading_gram(teacher.block, part), *task.moment_roots, rank)
    blocks.thin_in.copy_(basis.projection)
    # After the norms every thin coordinate has the same size, whatever its share of the residual.
    scale = (basis.variances.mean() / basis.variances).clamp(max=MAX_NORM_WEIGHT**2).sqrt()
    block.input_norm.copy_(scale)
    block.post_norm.copy_(scale)
    family = _Family(blocks, part, task)
    family.fit_heads()
    _fit_outputs(family)
    return basis.retained


@torch.no_grad()
def refit_blocks(blocks: ThinBlocks, part: Part, task: Task) -> None:
    """Fits again what comes after the heads of blocks that `fit_blocks` has fitted, to what all
    others leave (backfitting), and keeps `task.after` true."""
    family = _Family(blocks, part, task)
    family.run_heads()
    family.add(-1.0)
    _fit_outputs(family)


def _fit_outputs(family: "_Family") -> None:
    """Sets what comes after the heads, and adds what the blocks add to `task.after`."""
    blocks, task = family.blocks, family.task
    block, projection = blocks.block, blocks.thin_in.double()
    # A first output projection gives the FFN what it reads in the parent: the residual with the
    # whole layer's attention added, as far as this block's heads can tell.
    first_out = task.regress(
        (heads, family.read(task.teacher.attention, piece), piece.rows.offsets)
        for piece, heads in zip(task.pieces, family.heads, strict=True)
    )
    block.mixer.o_proj.copy_(first_out)
    family.fit_neurons()

    # What to write: reduced-rank regression of the target on heads and neurons together.
    gram, cross = task.moments(family.outputs())
    width = first_out.shape[2]
    write, mixing = reduced_rank(gram, cross, blocks.thin_out.shape[2], task.penalty)
    # The thin coordinates are free up to a turn; take the one in which heads write what the
    # FFN is to read, and in which thin_in undoes thin_out where that leaves a choice. A general
    # map would fit better on paper, and blow up rounding errors by the inverse it puts here.
    of_heads = mixing[..., :width]
    head_gram = gram[..., :width, :width]
    turn, size = aligning_turn(of_heads, first_out, head_gram, projection @ write)
    blocks.thin_out.copy_(write @ turn.mT / size)
    block.mixer.o_proj.copy_(size * turn @ of_heads)
    del gram, cross, write, mixing, of_heads, head_gram

    # The output projection moved, so the neurons see other inputs: refit them, then their output.
    family.fit_neurons()
    full = task.regress(family.leftovers())
    block.mlp.down_proj.copy_(least_squares_left(blocks.thin_out.double(), full))
    family.add()


class _Family:
    """Blocks that are being fitted, and what they read and their heads give, by piece.

    thin: (M, width) each; heads: (M, heads * head_dim) each, once they are fitted.
    """

    def __init__(self, blocks: ThinBlocks, part: Part, task: Task) -> None:
        """thin_in is set already."""
        self.blocks, self.part, self.task = blocks, part, task
        self.thin = [self.read(task.x, piece) for piece in task.pieces]
        self.heads: list[Tensor] = []

    def read(self, x: Tensor, piece: Piece) -> Tensor:
        """thin_in of x (n, d_model), by row of the piece."""
        return grouped_linear(piece.gather(x), self.blocks.thin_in, piece.rows)

    def fit_heads(self) -> None:
        """Fits q, k and v to the parent's, on what the block reads."""
        mixer, task, kv_heads = self.blocks.block.mixer, self.task, self.part.kv_heads
        if isinstance(mixer, StackedGatedDeltaNet):  # a key-value head for every query head
            copies = len(self.part.heads) // len(kv_heads)
            kv_heads = tuple(h for h in kv_heads for _ in range(copies))
        shares = {"q": self.part.heads, "k": kv_heads, "v": kv_heads}
        weights = [task.teacher.projection(name, heads) for name, heads in shares.items()]
        biased = getattr(mixer, "q_bias", None) is not None
        fitted = task.regress(self._mixer_samples(biased), torch.cat(weights))
        width = self.blocks.thin_in.shape[1]
        for name, own in zip(shares, fitted.split([len(w) for w in weights], dim=1), strict=True):
            getattr(mixer, f"{name}_proj").copy_(own[..., :width])
            if biased:
                getattr(mixer, f"{name}_bias").copy_(own[..., -1])
        if isinstance(mixer, StackedGatedDeltaNet):
            set_gated_deltanet(mixer, self._sites(), lambda samples: task.regress(samples))
        else:
            for name in ("q_norm", "k_norm"):
                if getattr(mixer, name) is not None:
                    getattr(mixer, name).copy_(getattr(task.teacher.mixer, name))
            if mixer.o_bias is not None:
                mixer.o_bias.zero_()
        self.run_heads()

    def run_heads(self) -> None:
        """What the heads give, with the weights that they have."""
        mixer, task = self.blocks.block.mixer, self.task
        for piece, thin in zip(task.pieces, self.thin, strict=True):
            context, read = piece.chunk.context, self._normed(piece, thin)
            out = mixer.heads(read, piece.rows, context.rotary, context.stream, None)
            self.heads.append(out.flatten(1))

    def fit_neurons(self) -> None:
        """Fits gate and up to the parent's, on what the block's FFN reads."""
        mlp, teacher = self.blocks.block.mlp, self.task.teacher
        samples = (
            (
                self._mlp_input(i),
                piece.rows.gather(teacher.mlp_input(piece.chunk)),
                piece.rows.offsets,
            )
            for i, piece in enumerate(self.task.pieces)
        )
        fitted = self.task.regress(samples, teacher.neurons(self.part))
        assert mlp.gate_proj is not None
        for weight, own in zip((mlp.gate_proj, mlp.up_proj), fitted.chunk(2, dim=1), strict=True):
            weight.copy_(own)

    def outputs(self) -> Iterator[Sample]:
        """Heads and neurons, and what they are to give together."""
        for i, piece in enumerate(self.task.pieces):
            wanted, weight = self._target(piece)
            features = torch.cat([self.heads[i], self._neurons(i)], dim=1).mul_(weight)
            yield features, wanted, piece.rows.offsets

    def leftovers(self) -> Iterator[Sample]:
        """Neurons, and what the heads leave to them."""
        for i, piece in enumerate(self.task.pieces):
            wanted, weight = self._target(piece)
            written = self._written(self._from_heads(i) * weight, piece)
            yield self._neurons(i).mul_(weight), wanted.sub_(written), piece.rows.offsets

    def add(self, sign: float = 1.0) -> None:
        """What the fitted blocks add to the residual; with sign -1, takes it away again."""
        for i, piece in enumerate(self.task.pieces):
            after = self.task.after[piece.chunk.tokens]
            down = grouped_linear(self._neurons(i), self.blocks.block.mlp.down_proj, piece.rows)
            delta = (self._from_heads(i) + down) * (sign * piece.gate[:, None])
            after += piece.rows.scatter(self._written(delta, piece), len(after))

    def _target(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """(M, d_model), what is left to add, by importance; and (M, 1), what outputs are worth."""
        tokens, task = piece.chunk.tokens, self.task
        importance = task.importance[tokens, None]
        left = (task.teacher.output[tokens] - task.after[tokens]).mul_(importance)
        return piece.rows.gather(left), piece.gate[:, None] * piece.rows.gather(importance)

    def _mixer_samples(self, biased: bool) -> Iterator[Sample]:
        for piece, thin in zip(self.task.pieces, self.thin, strict=True):
            read = self._normed(piece, thin)
            if biased:
                read = torch.cat([read, torch.ones_like(read[:, :1])], dim=1)
            wanted = self.task.teacher.attention_input(piece.chunk)
            yield read, piece.rows.gather(wanted), piece.rows.offsets

    def _sites(self) -> list[Site]:
        return [
            Site(
                self._normed(piece, thin),
                piece.rows,
                piece.chunk.context,
                piece.rows.gather(self.task.teacher.heads(piece.chunk, self.part.heads)),
            )
            for piece, thin in zip(self.task.pieces, self.thin, strict=True)
        ]

    def _normed(self, piece: Piece, thin: Tensor) -> Tensor:
        return self.blocks.block.norm(thin, self.blocks.block.input_norm, piece.rows)

    def _from_heads(self, i: int) -> Tensor:
        return grouped_linear(
            self.heads[i], self.blocks.block.mixer.o_proj, self.task.pieces[i].rows
        )

    def _mlp_input(self, i: int) -> Tensor:
        middle, block = self.thin[i] + self._from_heads(i), self.blocks.block
        return block.norm(middle, block.post_norm, self.task.pieces[i].rows)

    def _neurons(self, i: int) -> Tensor:
        return self.blocks.block.mlp.neurons(self._mlp_input(i), self.task.pieces[i].rows)

    def _written(self, delta: Tensor, piece: Piece) -> Tensor:
        return grouped_linear(delta, self.blocks.thin_out, piece.rows)
