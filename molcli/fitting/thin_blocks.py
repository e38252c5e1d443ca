"""Fit thin blocks to what they should read and add, by least squares on the student's residual.

Inputs: the student's residual (n, d_model) before the layer, the `LayerTargets` of the parent's
layer, and the rows that each block sees. Output: all weights of a group of B thin blocks, in place.

The order inside a block follows the data: thin_in, the mixer's projections, the heads' outputs, the
neurons, thin_out. Every matrix is fitted to the features that the matrices before it produce after
their own fit: a truncated parent matrix alone is no better than leaving the layer out.

For all tokens, only residuals are kept, and the heads' outputs of the group that is being fitted if
they are narrow. Inputs, neurons and targets are recomputed for each regression, one chunk at a
time, and only their moments are summed. All groups are fitted to read before any is fitted to
write: what they read does not depend on what others write, and so the parent's residual can move
through the layer in place.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.fitting.chunks import MAX_KEPT_HEADS, Chunk
from molcli.fitting.partition import BlockPart
from molcli.fitting.projection import reading_gram
from molcli.fitting.targets import LayerTargets
from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.packed_rows import PackedRows
from molcli.maths.bases import reading_basis
from molcli.maths.least_squares import aligning_rotation, least_squares_left, reduced_rank, ridge
from molcli.maths.moments import Sample, regression_moments
from molcli.model.layers import ThinBlocks
from molcli.model.mixers.base import AttentionSample

MAX_NORM_WEIGHT = 100.0  # limits how much coordinates that hardly vary are amplified


@dataclass(frozen=True)
class GroupRows:
    """The rows of one group of blocks in one chunk. gate: (M,), the weight of each row's output."""

    chunk: Chunk
    rows: PackedRows
    gate: Tensor


HeadOutputs = Iterable[tuple[GroupRows, Tensor]]
"""The heads' outputs (M, heads * head_dim) for the rows of each chunk; can be iterated again."""


@dataclass(frozen=True)
class RecomputedHeads:
    """`HeadOutputs` that are computed on each iteration."""

    rows: list[GroupRows]
    compute: Callable[[GroupRows], Tensor]

    def __iter__(self) -> Iterator[tuple[GroupRows, Tensor]]:
        return ((group_rows, self.compute(group_rows)) for group_rows in self.rows)


@dataclass(frozen=True)
class FitData:
    """The data of a group's regressions, and their regularisation.

    targets: of the parent's layer. x: (n, d_model), the student's residual before the layer.
    moment_roots: `square_roots` of the unit-rms residual's second moment, (d_model, d_model) each.
    rows: those of the group, by chunk. penalty, shrinkage: see `ridge` and `shrink_to_pooled`.
    """

    targets: LayerTargets
    x: Tensor
    moment_roots: tuple[Tensor, Tensor]
    rows: list[GroupRows]
    penalty: float
    shrinkage: float

    def regress(self, samples: Iterator[Sample], through: Tensor | None = None) -> Tensor:
        """Solve a ridge regression for each of B blocks.

        Args:
            samples: features (M, p) and targets (M, q or d) of each chunk.
            through: (q, d), where the regression targets are this map of the samples' targets.

        Returns:
            (B, q, p) float64.
        """
        gram, cross = self.moments(samples)
        if through is not None:
            cross = cross @ through.double().mT
        return ridge(gram, cross, self.penalty)

    def moments(self, samples: Iterator[Sample]) -> tuple[Tensor, Tensor]:
        """Return `regression_moments` with the shrinkage of this group."""
        return regression_moments(samples, self.shrinkage)


@dataclass(frozen=True)
class OutputError:
    """What the blocks still have to add, updated in place as they are fitted.

    error: (n, d_model), the parent's residual after the layer minus the student's, with all blocks
    that are fitted so far. weight: (n,), the weight of each token's error.
    """

    error: Tensor
    weight: Tensor

    def of_rows(self, group_rows: GroupRows) -> tuple[Tensor, Tensor]:
        """Return the weighted error (M, d_model), and the weight of each row's output (M, 1)."""
        tokens = group_rows.chunk.tokens
        weight = self.weight[tokens, None]
        error = self.error[tokens] * weight
        rows = group_rows.rows
        return rows.gather(error), group_rows.gate[:, None] * rows.gather(weight)


class BlockGroup:
    """Blocks that take over the same part of the parent: a shared block, or routed clones.

    The order of use: `fit_reading` (before `LayerTargets.add_attention`), then `fit_writing` and
    any number of `refit_writing` (after it, and before `LayerTargets.add_ffn`).

    Attributes:
        retained: fraction of the parent's reading energy that thin_in retains.
        projection: (width, d_model) float64, thin_in before it was rounded.
        first_o_proj: (B, width, heads * head_dim) float64, o_proj before thin_out is fitted.
    """

    retained: float
    projection: Tensor
    first_o_proj: Tensor

    def __init__(self, blocks: ThinBlocks, part: BlockPart, data: FitData) -> None:
        self.blocks, self.part, self.data = blocks, part, data

    @torch.no_grad()
    def fit_reading(self) -> None:
        """Set thin_in, the norms, and the mixer without o_proj."""
        self._fit_thin_in_and_norms()
        self._fit_mixer()
        self.first_o_proj = self._fit_first_o_proj()

    @torch.no_grad()
    def fit_writing(self, error: OutputError) -> None:
        """Set o_proj, the FFN and thin_out, and subtract what the blocks add from the error."""
        self._fit_writing(error, self._head_outputs())

    @torch.no_grad()
    def refit_writing(self, error: OutputError) -> None:
        """Repeat `fit_writing` on the error that all other groups leave (backfitting)."""
        heads = self._head_outputs()
        self._add_output_to(error, heads, 1.0)
        self._fit_writing(error, heads)

    # The steps of `fit_reading`

    def _fit_thin_in_and_norms(self) -> None:
        """Set thin_in to the basis that keeps most of what the part reads."""
        blocks, data = self.blocks, self.data
        gram = reading_gram(data.targets.block, self.part)
        basis = reading_basis(gram, *data.moment_roots, blocks.thin_in.shape[1])
        self.retained, self.projection = basis.retained, basis.projection
        blocks.thin_in.copy_(basis.projection)
        # After the norms every thin coordinate has the same size, however large its part of the
        # residual is.
        scale = (basis.variances.mean() / basis.variances).clamp(max=MAX_NORM_WEIGHT**2).sqrt()
        for norm in (blocks.block.input_norm, blocks.block.post_norm):
            if norm is not None:
                norm.copy_(scale)

    def _fit_mixer(self) -> None:
        """Fit q, k and v to the parent's on what the block reads; then what else the mixer has."""
        mixer, data, kv_heads = self.blocks.block.mixer, self.data, self.part.kv_heads
        # A mixer without shared key-value heads gets a copy for every query head.
        copies = mixer.k_proj.shape[1] // (len(kv_heads) * data.targets.mixer.head_dim)
        kv_heads = tuple(h for h in kv_heads for _ in range(copies))
        heads = {"q": self.part.heads, "k": kv_heads, "v": kv_heads}
        weights = [data.targets.projection(name, own) for name, own in heads.items()]
        biased = getattr(mixer, "q_bias", None) is not None
        fitted = data.regress(self._mixer_samples(biased), torch.cat(weights))
        width = self.blocks.thin_in.shape[1]
        for name, own in zip(heads, fitted.split([len(w) for w in weights], dim=1), strict=True):
            getattr(mixer, f"{name}_proj").copy_(own[..., :width])
            if biased:
                getattr(mixer, f"{name}_bias").copy_(own[..., -1])
        for name, own_heads in (("q", self.part.heads), ("k", kv_heads)):
            if (norm := getattr(mixer, f"{name}_norm", None)) is not None:
                norm.copy_(data.targets.head_norm(name, own_heads))
        if (o_bias := getattr(mixer, "o_bias", None)) is not None:
            o_bias.zero_()
        mixer.start_from_attention(self._samples, data.regress)

    def _fit_first_o_proj(self) -> Tensor:
        """Fit o_proj to thin_in of the whole layer's attention, as far as these heads predict it.

        With it the FFN reads what it reads in the parent: the residual with attention added.
        """
        attention = self.data.targets.attention_output
        return self.data.regress(
            (
                self._compute_heads(group_rows),
                self._thin_in(attention[group_rows.chunk.tokens], group_rows),
                group_rows.rows.offsets,
            )
            for group_rows in self.data.rows
        )

    # The steps of `fit_writing`

    def _fit_writing(self, error: OutputError, heads: HeadOutputs) -> None:
        self.blocks.block.mixer.o_proj.copy_(self.first_o_proj)
        self._fit_gate_and_up(heads)
        self._fit_thin_out_and_o_proj(error, heads)
        self._fit_gate_and_up(heads)  # o_proj has changed, and with it what the FFN reads
        self._fit_down(error, heads)
        self._add_output_to(error, heads, -1.0)

    def _fit_gate_and_up(self, heads: HeadOutputs) -> None:
        """Fit gate and up to the parent's, on what the block's FFN reads."""
        mlp, targets = self.blocks.block.mlp, self.data.targets
        samples = (
            (
                self._ffn_input(own, group_rows),
                group_rows.rows.gather(targets.ffn_input(group_rows.chunk)),
                group_rows.rows.offsets,
            )
            for group_rows, own in heads
        )
        fitted = self.data.regress(samples, targets.gate_and_up(self.part))
        assert mlp.gate_proj is not None
        for weight, own in zip((mlp.gate_proj, mlp.up_proj), fitted.chunk(2, dim=1), strict=True):
            weight.copy_(own)

    def _fit_thin_out_and_o_proj(self, error: OutputError, heads: HeadOutputs) -> None:
        """Fit thin_out by a reduced-rank regression of the error on heads and neurons together."""
        blocks, data = self.blocks, self.data
        gram, cross = data.moments(self._joint_samples(error, heads))
        inner = self.first_o_proj.shape[2]
        write, mixing = reduced_rank(gram, cross, blocks.thin_out.shape[2], data.penalty)
        # The thin coordinates are free up to a rotation. Take the one in which heads write what the
        # FFN is to read, and in which thin_in undoes thin_out where that leaves a choice. A general
        # map would have a smaller training error, but its inverse in thin_out would amplify
        # rounding errors.
        of_heads = mixing[..., :inner]
        rotation, size = aligning_rotation(
            of_heads, self.first_o_proj, gram[..., :inner, :inner], self.projection @ write
        )
        blocks.thin_out.copy_(write @ rotation.mT / size)
        blocks.block.mixer.o_proj.copy_(size * rotation @ of_heads)

    def _fit_down(self, error: OutputError, heads: HeadOutputs) -> None:
        """Fit down_proj to what the heads leave of the error."""
        full = self.data.regress(self._neuron_samples(error, heads))
        down_proj = least_squares_left(self.blocks.thin_out.double(), full)
        self.blocks.block.mlp.down_proj.copy_(down_proj)

    def _add_output_to(self, error: OutputError, heads: HeadOutputs, sign: float) -> None:
        """Add sign times the blocks' gated output to the error, in place."""
        for group_rows, own in heads:
            rows, down_proj = group_rows.rows, self.blocks.block.mlp.down_proj
            left = error.error[group_rows.chunk.tokens]
            down = grouped_linear(self._neurons(own, group_rows), down_proj, rows)
            delta = (self._o_proj(own, group_rows) + down) * (sign * group_rows.gate[:, None])
            left += rows.combine(self._thin_out(delta, group_rows))

    # Samples of the regressions: features, targets, ends of the blocks' rows

    def _mixer_samples(self, biased: bool) -> Iterator[Sample]:
        """The mixer's input, with a column of ones for biases, and the parent's."""
        for group_rows in self.data.rows:
            read = self._mixer_input(group_rows)
            if biased:
                read = torch.cat([read, torch.ones_like(read[:, :1])], dim=1)
            wanted = self.data.targets.attention_input(group_rows.chunk)
            yield read, group_rows.rows.gather(wanted), group_rows.rows.offsets

    def _joint_samples(self, error: OutputError, heads: HeadOutputs) -> Iterator[Sample]:
        """Heads and neurons, and the error that they are to correct together."""
        for group_rows, own in heads:
            wanted, weight = error.of_rows(group_rows)
            features = torch.cat([own, self._neurons(own, group_rows)], dim=1).mul_(weight)
            yield features, wanted, group_rows.rows.offsets

    def _neuron_samples(self, error: OutputError, heads: HeadOutputs) -> Iterator[Sample]:
        """Neurons, and what the heads leave of the error."""
        for group_rows, own in heads:
            wanted, weight = error.of_rows(group_rows)
            written = self._thin_out(self._o_proj(own, group_rows) * weight, group_rows)
            features = self._neurons(own, group_rows).mul_(weight)
            yield features, wanted.sub_(written), group_rows.rows.offsets

    def _samples(self) -> list[AttentionSample]:
        targets = self.data.targets
        return [
            AttentionSample(
                self._mixer_input(group_rows),
                group_rows.rows,
                group_rows.chunk.context,
                group_rows.rows.gather(targets.head_outputs(group_rows.chunk, self.part.heads)),
            )
            for group_rows in self.data.rows
        ]

    # The forward pass of the blocks, step by step, on the rows of one chunk

    def _thin_in(self, x: Tensor, group_rows: GroupRows) -> Tensor:
        """x: (tokens, d_model) of the chunk -> (M, width)."""
        rows = group_rows.rows
        return grouped_linear(rows.gather(x), self.blocks.thin_in, rows)

    def _thin_residual(self, group_rows: GroupRows) -> Tensor:
        """thin_in of the student's residual, (M, width)."""
        return self._thin_in(self.data.x[group_rows.chunk.tokens], group_rows)

    def _mixer_input(self, group_rows: GroupRows) -> Tensor:
        """(M, width)."""
        block = self.blocks.block
        return block.norm(self._thin_residual(group_rows), block.input_norm, group_rows.rows)

    def _compute_heads(self, group_rows: GroupRows) -> Tensor:
        """The heads' outputs, (M, heads * head_dim)."""
        context = group_rows.chunk.context.blocks(group_rows.rows)
        return self.blocks.block.mixer.heads(self._mixer_input(group_rows), context).flatten(1)

    def _head_outputs(self) -> HeadOutputs:
        """The heads' outputs of all chunks, kept in memory where they are narrow.

        They are kept in one tensor: many of medium size would fragment the heap.
        """
        data, inner = self.data, self.first_o_proj.shape[2]
        if inner > MAX_KEPT_HEADS * data.x.shape[1]:
            return RecomputedHeads(data.rows, self._compute_heads)
        counts = [len(group_rows.gate) for group_rows in data.rows]
        memory = data.x.new_empty(sum(counts), inner)
        kept = list(zip(data.rows, memory.split(counts), strict=True))
        for group_rows, heads in kept:
            heads.copy_(self._compute_heads(group_rows))
        return kept

    def _o_proj(self, heads: Tensor, group_rows: GroupRows) -> Tensor:
        """heads: (M, heads * head_dim) -> (M, width)."""
        return grouped_linear(heads, self.blocks.block.mixer.o_proj, group_rows.rows)

    def _ffn_input(self, heads: Tensor, group_rows: GroupRows) -> Tensor:
        """heads: (M, heads * head_dim) -> (M, width)."""
        block = self.blocks.block
        middle = self._thin_residual(group_rows) + self._o_proj(heads, group_rows)
        return block.norm(middle, block.post_norm, group_rows.rows)

    def _neurons(self, heads: Tensor, group_rows: GroupRows) -> Tensor:
        """heads: (M, heads * head_dim) -> (M, d_ff)."""
        return self.blocks.block.mlp.hidden(self._ffn_input(heads, group_rows), group_rows.rows)

    def _thin_out(self, delta: Tensor, group_rows: GroupRows) -> Tensor:
        """delta: (M, width) -> (M, d_model)."""
        return grouped_linear(delta, self.blocks.thin_out, group_rows.rows)
