"""Fitting thin blocks to what they should add, by least squares on the student's own stream.

The order inside a block follows the data: what it reads, its projections, its heads' output, its
neurons, what it writes. Every matrix is refitted on the features that the matrices before it really
produce: a truncated parent matrix alone is no better than leaving the layer out.

Of all tokens, only residuals are kept, and what the heads of the family at work give, if they are
few; what it reads, its neurons, inputs and targets are computed anew for each regression, a chunk
at a time, and only their moments are summed. All families are fitted to read first: nothing that
they read depends on what others write, and the parent's residual can then move on in place.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.fitting.chunks import MOST_HEADS_HELD, Chunk
from molcli.fitting.gated_deltanet import Site, set_gated_deltanet
from molcli.fitting.partition import Part
from molcli.fitting.projection import reading_gram
from molcli.fitting.targets import Teacher
from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.packed_rows import PackedRows
from molcli.maths.bases import reading_basis
from molcli.maths.least_squares import aligning_rotation, least_squares_left, reduced_rank, ridge
from molcli.maths.moments import Sample, regression_moments
from molcli.model.layers import ThinBlocks
from molcli.model.mixers import Attention, GatedDeltaNet

MAX_NORM_WEIGHT = 100.0  # coordinates that hardly vary are not blown up without bound


@dataclass(frozen=True)
class Piece:
    """A chunk's rows of one family. gate: (M,), the weight of each row's output."""

    chunk: Chunk
    rows: PackedRows
    gate: Tensor


Given = Iterable[tuple[Piece, Tensor]]
"""By piece, as often as asked, (M, heads * head_dim), what the heads of the family read."""


@dataclass(frozen=True)
class Anew:
    """Given, from `heads` at each turn."""

    pieces: list[Piece]
    heads: Callable[[Piece], Tensor]

    def __iter__(self) -> Iterator[tuple[Piece, Tensor]]:
        return ((piece, self.heads(piece)) for piece in self.pieces)


@dataclass(frozen=True)
class Task:
    """What a family of blocks, which share one part of the parent, is fitted to.

    x: (n, d_model), the student's residual before the layer. moment_roots: `square_roots` of the
    unit-rms residual's second moment. penalty, shrinkage: of the regressions (`ridge`,
    `shrink_to_pooled`).
    """

    teacher: Teacher
    x: Tensor
    moment_roots: tuple[Tensor, Tensor]
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


@dataclass(frozen=True)
class Goal:
    """What is left to write: left, (n, d_model), what the parent's residual after the layer has
    beyond the student's, with all that was fitted so far. importance: (n,), of each token's error.
    """

    left: Tensor
    importance: Tensor

    def of(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """(M, d_model), what is left, by importance; and (M, 1), what a row's output is worth."""
        tokens = piece.chunk.tokens
        importance = self.importance[tokens, None]
        left = self.left[tokens] * importance
        return piece.rows.gather(left), piece.gate[:, None] * piece.rows.gather(importance)


class Family:
    """Blocks that are fitted to one part of the parent: first to read, then to write."""

    @torch.no_grad()
    def __init__(self, blocks: ThinBlocks, part: Part, task: Task) -> None:
        """Sets thin_in, the norms, q, k, v; before `Teacher.attend`.

        retained: the share of the parent's reading energy that thin_in retains. first_out: a first
        output projection.
        """
        self.blocks, self.part, self.task = blocks, part, task
        block, teacher = blocks.block, task.teacher
        rank = blocks.thin_in.shape[1]
        basis = reading_basis(reading_gram(teacher.block, part), *task.moment_roots, rank)
        self.retained, self.projection = basis.retained, basis.projection
        blocks.thin_in.copy_(basis.projection)
        # After the norms every thin coordinate has the same size, whatever its share of the
        # residual.
        scale = (basis.variances.mean() / basis.variances).clamp(max=MAX_NORM_WEIGHT**2).sqrt()
        for norm in (block.input_norm, block.post_norm):
            if norm is not None:
                norm.copy_(scale)
        self._fit_heads()
        # A first output projection gives the FFN what it reads in the parent: the residual with the
        # whole layer's attention added, as far as this block's heads can tell.
        self.first_out = task.regress(
            (
                self._heads(piece),
                self._read(teacher.attention[piece.chunk.tokens], piece),
                piece.rows.offsets,
            )
            for piece in task.pieces
        )

    @torch.no_grad()
    def write(self, goal: Goal) -> None:
        """Sets all other parameters, and takes what the blocks add from `goal.left`; between
        `Teacher.attend` and `Teacher.feed`."""
        self._write(goal, self._given())

    @torch.no_grad()
    def rewrite(self, goal: Goal) -> None:
        """`write` once more, to what all others leave (backfitting)."""
        given = self._given()
        self._leave(goal, given, 1.0)
        self._write(goal, given)

    def _write(self, goal: Goal, given: Given) -> None:
        blocks, block, task = self.blocks, self.blocks.block, self.task
        block.mixer.o_proj.copy_(self.first_out)
        self._fit_neurons(given)

        # What to write: reduced-rank regression of the target on heads and neurons together.
        gram, cross = task.moments(self._outputs(goal, given))
        width = self.first_out.shape[2]
        write, mixing = reduced_rank(gram, cross, blocks.thin_out.shape[2], task.penalty)
        # The thin coordinates are free up to a turn; take the one in which heads write what the
        # FFN is to read, and in which thin_in undoes thin_out where that leaves a choice. A general
        # map would fit better on paper, and blow up rounding errors by the inverse it puts here.
        of_heads = mixing[..., :width]
        head_gram = gram[..., :width, :width]
        turn, size = aligning_rotation(of_heads, self.first_out, head_gram, self.projection @ write)
        blocks.thin_out.copy_(write @ turn.mT / size)
        block.mixer.o_proj.copy_(size * turn @ of_heads)
        del gram, cross, write, mixing, of_heads, head_gram

        # The output projection moved, so the neurons see other inputs: refit them, then their
        # output.
        self._fit_neurons(given)
        full = task.regress(self._leftovers(goal, given))
        block.mlp.down_proj.copy_(least_squares_left(blocks.thin_out.double(), full))
        self._leave(goal, given, -1.0)

    def _leave(self, goal: Goal, given: Given, sign: float) -> None:
        """What the blocks add is left to write again; with sign -1, no more."""
        for piece, heads in given:
            left, down_proj = goal.left[piece.chunk.tokens], self.blocks.block.mlp.down_proj
            down = grouped_linear(self._neurons(heads, piece), down_proj, piece.rows)
            delta = (self._from_heads(heads, piece) + down) * (sign * piece.gate[:, None])
            left += piece.rows.combine(self._written(delta, piece))

    def _fit_heads(self) -> None:
        """Fits q, k and v to the parent's, on what the block reads."""
        mixer, task, kv_heads = self.blocks.block.mixer, self.task, self.part.kv_heads
        if isinstance(mixer, GatedDeltaNet):  # a key-value head for every query head
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
        if isinstance(mixer, GatedDeltaNet):
            set_gated_deltanet(mixer, self._sites(), lambda samples: task.regress(samples))
            return
        assert isinstance(mixer, Attention)
        for name, heads in (("q", self.part.heads), ("k", kv_heads)):
            norm = getattr(mixer, f"{name}_norm")
            if norm is not None:
                norm.copy_(task.teacher.head_norm(name, heads))
        if mixer.o_bias is not None:
            mixer.o_bias.zero_()

    def _fit_neurons(self, given: Given) -> None:
        """Fits gate and up to the parent's, on what the block's FFN reads."""
        mlp, teacher = self.blocks.block.mlp, self.task.teacher
        samples = (
            (
                self._mlp_input(heads, piece),
                piece.rows.gather(teacher.mlp_input(piece.chunk)),
                piece.rows.offsets,
            )
            for piece, heads in given
        )
        fitted = self.task.regress(samples, teacher.neurons(self.part))
        assert mlp.gate_proj is not None
        for weight, own in zip((mlp.gate_proj, mlp.up_proj), fitted.chunk(2, dim=1), strict=True):
            weight.copy_(own)

    def _outputs(self, goal: Goal, given: Given) -> Iterator[Sample]:
        """Heads and neurons, and what they are to give together."""
        for piece, heads in given:
            wanted, weight = goal.of(piece)
            features = torch.cat([heads, self._neurons(heads, piece)], dim=1).mul_(weight)
            yield features, wanted, piece.rows.offsets

    def _leftovers(self, goal: Goal, given: Given) -> Iterator[Sample]:
        """Neurons, and what the heads leave to them."""
        for piece, heads in given:
            wanted, weight = goal.of(piece)
            written = self._written(self._from_heads(heads, piece) * weight, piece)
            yield self._neurons(heads, piece).mul_(weight), wanted.sub_(written), piece.rows.offsets

    def _mixer_samples(self, biased: bool) -> Iterator[Sample]:
        for piece in self.task.pieces:
            read = self._mixer_input(piece)
            if biased:
                read = torch.cat([read, torch.ones_like(read[:, :1])], dim=1)
            wanted = self.task.teacher.attention_input(piece.chunk)
            yield read, piece.rows.gather(wanted), piece.rows.offsets

    def _sites(self) -> list[Site]:
        return [
            Site(
                self._mixer_input(piece),
                piece.rows,
                piece.chunk.context,
                piece.rows.gather(self.task.teacher.heads(piece.chunk, self.part.heads)),
            )
            for piece in self.task.pieces
        ]

    def _read(self, x: Tensor, piece: Piece) -> Tensor:
        """thin_in of x (tokens, d_model) of the piece's chunk, by row."""
        return grouped_linear(piece.rows.gather(x), self.blocks.thin_in, piece.rows)

    def _thin(self, piece: Piece) -> Tensor:
        return self._read(self.task.x[piece.chunk.tokens], piece)

    def _mixer_input(self, piece: Piece) -> Tensor:
        block = self.blocks.block
        return block.norm(self._thin(piece), block.input_norm, piece.rows)

    def _heads(self, piece: Piece) -> Tensor:
        """(M, heads * head_dim), what the heads read."""
        context, mixer = piece.chunk.context, self.blocks.block.mixer
        read = self._mixer_input(piece)
        return mixer.heads(read, context.blocks(piece.rows)).flatten(1)

    def _given(self) -> Given:
        """All pieces' heads, in one tensor: many of medium size would leave holes in the heap."""
        pieces, width, d_model = self.task.pieces, self.first_out.shape[2], self.task.x.shape[1]
        if width > MOST_HEADS_HELD * d_model:
            return Anew(pieces, self._heads)
        counts = [len(piece.gate) for piece in pieces]
        out = self.task.x.new_empty(sum(counts), width)
        given = list(zip(pieces, out.split(counts), strict=True))
        for piece, heads in given:
            heads.copy_(self._heads(piece))
        return given

    def _from_heads(self, heads: Tensor, piece: Piece) -> Tensor:
        return grouped_linear(heads, self.blocks.block.mixer.o_proj, piece.rows)

    def _mlp_input(self, heads: Tensor, piece: Piece) -> Tensor:
        block, middle = self.blocks.block, self._thin(piece) + self._from_heads(heads, piece)
        return block.norm(middle, block.post_norm, piece.rows)

    def _neurons(self, heads: Tensor, piece: Piece) -> Tensor:
        return self.blocks.block.mlp.hidden(self._mlp_input(heads, piece), piece.rows)

    def _written(self, delta: Tensor, piece: Piece) -> Tensor:
        return grouped_linear(delta, self.blocks.thin_out, piece.rows)
