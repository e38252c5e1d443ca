"""Gated DeltaNet (arXiv 2412.06464), for the stacked weights of B blocks."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from molcli.kernels.gated_delta_rule import gated_delta_rule
from molcli.kernels.gated_delta_step import gated_delta_step
from molcli.kernels.grouped_linear import grouped_linear, grouped_linears
from molcli.kernels.indexed_linear import indexed_linear
from molcli.kernels.packed_rows import PackedRows
from molcli.kernels.qkv_conv import qkv_conv, short_conv_state
from molcli.maths.least_squares import ridge
from molcli.maths.moments import add_cross_moments
from molcli.model.mixers.base import (
    AttentionSample,
    BlockContext,
    CacheLength,
    Mixer,
    Regression,
    State,
    StaticState,
    StepContext,
)
from molcli.model.tokens import TokenStream

if TYPE_CHECKING:
    from molcli.model.configuration_mol import BlockSpec, MoLConfig

CONV_WIDTH = 4  # inputs that the short convolutions see
# Operations of a step of the gated delta rule, per entry of its state: decay 1, read at the key 2,
# rank-one update 2, read at the query 2.
DELTA_RULE_FLOPS = 7
# SiLU is nearly linear for small inputs; q and k are normalised after it, and the read-out too.
INPUT_RMS = 0.3
# Half-lives of a head's memory, in tokens that its block sees; and the fraction of a key's old
# value that a new one replaces.
HALF_LIVES = (4.0, 16.0, 64.0, 256.0, 2048.0)
BETAS = (0.1, 0.25, 0.5, 0.75)
FIRST_BETA = 0.25
SEARCH_TOKENS = 4096  # of the text: enough for two numbers per head
SEARCH_PENALTY = 1e-2


class GatedDeltaNet(Mixer):
    """The Gated DeltaNet of every block over its own rows.

    q, k and v pass a causal convolution and SiLU; q and k are brought to unit length. The read-out
    is normalised per head and gated by SiLU. There are no rotary positions: order comes from the
    convolution and the decay, which advance with the block's own tokens.
    """

    name = "gated_deltanet"
    is_recurrent = True
    float32_parameters = ("A_log", "dt_bias")
    no_decay_parameters = ("A_log", "dt_bias")
    new_parameters = (
        *("a_proj", "b_proj", "g_proj", "A_log", "dt_bias"),
        *("q_conv", "k_conv", "v_conv", "o_norm"),
    )

    def __init__(self, spec: "BlockSpec", config: "MoLConfig") -> None:
        super().__init__(spec, config)
        self.shape = (spec.num_heads, spec.head_dim)
        b, d, h = spec.num_blocks, spec.width, spec.num_heads
        inner = h * spec.head_dim
        for name in ("q_proj", "k_proj", "v_proj", "g_proj"):
            self.register_parameter(name, nn.Parameter(torch.empty(b, inner, d)))
        for name in ("q_conv", "k_conv", "v_conv"):
            self.register_parameter(name, nn.Parameter(torch.empty(b, inner, CONV_WIDTH)))
        for name in ("a_proj", "b_proj"):
            self.register_parameter(name, nn.Parameter(torch.empty(b, h, d)))
        self.o_proj = nn.Parameter(torch.empty(b, d, inner))
        self.o_norm = nn.Parameter(torch.empty(b, spec.head_dim))
        self.A_log = nn.Parameter(torch.empty(b, h))
        self.dt_bias = nn.Parameter(torch.empty(b, h))
        self.q_proj: nn.Parameter
        self.k_proj: nn.Parameter
        self.v_proj: nn.Parameter
        self.g_proj: nn.Parameter
        self.q_conv: nn.Parameter
        self.k_conv: nn.Parameter
        self.v_conv: nn.Parameter
        self.a_proj: nn.Parameter
        self.b_proj: nn.Parameter

    def initialize(self, std: float) -> None:
        """Draw the weights of an untrained model; decay as in arXiv 2412.06464: A from U(0, 16), dt
        log-uniform in [1e-3, 0.1]."""
        super().initialize(std)
        bound = self.q_conv.shape[-1] ** -0.5
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            init.uniform_(conv, -bound, bound)
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1e-3, 16).log())
        low, high = torch.tensor([1e-3, 0.1]).log().tolist()
        dt = torch.empty_like(self.dt_bias).uniform_(low, high).exp()
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """Mix the rows: (M, width) -> (M, width)."""
        return grouped_linear(self.heads(x, context).flatten(1), self.o_proj, context.rows)

    def heads(self, x: Tensor, context: BlockContext) -> Tensor:
        """Compute the gated read-out, before the output projection.

        Args:
            x: (M, width), normalised rows.

        Returns:
            (M, num_heads, head_dim).
        """
        rows, stream, state = context.rows, context.stream, context.state
        exact = torch.promote_types(x.dtype, torch.float32)
        segments = _Segments(rows, stream)
        qkv = torch.cat([self.q_proj, self.k_proj, self.v_proj], dim=1)
        mixed, gate = grouped_linears(x, (qkv, self.g_proj), rows)
        before = None if state is None else self._states(state, segments, mixed)
        conv = None if before is None else before["conv"]
        filters = (self.q_conv, self.k_conv, self.v_conv)
        q, k, v = qkv_conv(
            mixed, filters, rows, segments.of_row, segments.index, conv, self.shape[1]
        )
        a, b = (z.to(exact) for z in grouped_linears(x, (self.a_proj, self.b_proj), rows))
        decay = -rows.gather_per_block(self.A_log).to(exact).exp()
        g = decay * F.softplus(a + rows.gather_per_block(self.dt_bias).to(exact))
        recurrent = None if before is None else before["recurrent"]
        out, last = gated_delta_rule(
            q, k, v, g, b.sigmoid(), segments.cu_seqlens, segments.max_seqlen, recurrent
        )
        if state is not None and before is not None and last is not None:
            assert isinstance(state, RecurrentState)
            after = short_conv_state(mixed, segments.cu_seqlens, before["conv"])
            state.write("conv", segments.numbers, stream.batch_size, after)
            state.write("recurrent", segments.numbers, stream.batch_size, last)
        gate = F.silu(gate).unflatten(1, self.shape)
        norm = out.to(exact) * torch.rsqrt(out.to(exact).square().mean(-1, keepdim=True) + self.eps)
        return (
            norm.to(gate.dtype) * rows.gather_per_block(self.o_norm)[:, None].to(gate.dtype) * gate
        )

    def _states(self, state: State, segments: "_Segments", mixed: Tensor) -> dict[str, Tensor]:
        """What the cache holds before every segment; zeros where a segment is new."""
        assert isinstance(state, RecurrentState)
        heads, dim = self.shape
        exact = torch.promote_types(mixed.dtype, torch.float32)
        sizes = {"conv": (mixed.shape[1], CONV_WIDTH - 1), "recurrent": (heads, dim, dim)}
        dtypes = {"conv": mixed.dtype, "recurrent": exact}
        batch, blocks = segments.batch_size, self.A_log.shape[0]
        if not state.tensors:
            state.tensors = {
                n: mixed.new_zeros(batch, blocks, *s, dtype=dtypes[n]) for n, s in sizes.items()
            }
        return {n: state.read(n, segments.numbers, batch) for n in sizes}

    def step(self, x: Tensor, norm: Tensor | None, context: StepContext) -> Tensor:
        """Advance convolution and state by one token, in place: (R, width) -> (R, width)."""
        weights = [self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.a_proj, self.b_proj]
        projected = indexed_linear(x, list(weights), context.rows, norm=norm, eps=self.eps)
        heads = gated_delta_step(
            projected,
            [self.q_conv, self.k_conv, self.v_conv],
            self.A_log,
            self.dt_bias,
            self.o_norm,
            context.state.tensors["conv"],
            context.state.tensors["recurrent"],
            context.rows.blocks,
            context.active,
            self.eps,
        )
        return indexed_linear(heads, [self.o_proj], context.rows)

    @torch.no_grad()
    def start_from_attention(
        self, make_samples: Callable[[], Sequence[AttentionSample]], regress: Regression
    ) -> None:
        """Search decay and beta, and fit gate, convolutions and norm to softmax heads.

        Decay and beta are constants of a head, searched on a grid: for each value the heads run,
        and a ridge regression per head measures how much of the softmax head's output a linear map
        of theirs predicts. Convolutions and the norm absorb the sizes of their inputs and
        outputs, so that q, k, v and o are as large as with softmax: Adam's steps are as long for a
        small weight as for a large one.
        """
        samples = make_samples()
        count = sum(len(i.read) for i in samples)
        _set_convolutions(self, samples, count)
        self.a_proj.zero_()
        self.A_log.zero_()
        _fit_norm_and_gate(self, samples, count, regress)
        # The linear map of the input that is closest to a constant 1, (B, 1, d).
        constant = regress(
            (i.read, torch.ones_like(i.read[:, :1]), i.rows.offsets) for i in samples
        )
        _search_decay_and_beta(self, list(_first_tokens(samples, SEARCH_TOKENS)), constant)

    @staticmethod
    def new_state(spec: "BlockSpec") -> State:
        """Make an empty `RecurrentState`."""
        return RecurrentState()

    @staticmethod
    def new_static_state(
        spec: "BlockSpec",
        slots: int,
        length: CacheLength,
        dtype: torch.dtype,
        device: torch.device,
    ) -> StaticState:
        """Make an empty `StaticRecurrentState`."""
        return StaticRecurrentState(spec, len(length.counts), dtype, device)

    @staticmethod
    def count_parameters(spec: "BlockSpec", config: "MoLConfig") -> int:
        """Count projections, convolutions, decay and the read-out's norm."""
        inner = spec.num_heads * spec.head_dim
        # q, k, v, g and o; a and b
        projections = 5 * inner * spec.width + 2 * spec.num_heads * spec.width
        return projections + 3 * CONV_WIDTH * inner + 2 * spec.num_heads + spec.head_dim

    @staticmethod
    def count_flops(spec: "BlockSpec", tokens: float) -> tuple[float, float]:
        """Count projections and convolutions, and 7 * head_dim^2 a head for the delta rule."""
        inner = spec.num_heads * spec.head_dim
        weights = 5 * inner * spec.width + 2 * spec.num_heads * spec.width + 3 * CONV_WIDTH * inner
        return 2.0 * weights, DELTA_RULE_FLOPS * inner * spec.head_dim

    @staticmethod
    def activation_bytes(spec: "BlockSpec", product_bytes: int, compiled: bool) -> int:
        """Estimate queries, keys, values and outputs, and besides them convolutions, unit lengths,
        decay, gate and its norm; compiled, what precedes the convolution, the gate, and the linear
        systems of chunks of 64 tokens."""
        inner, p = spec.num_heads * spec.head_dim, product_bytes
        kept = 4 * inner * p
        if compiled:
            return kept + p * (4 * inner + 64 * spec.num_heads)
        conv = 3 * inner * (5 * _FP32_BYTES + 4 * p)
        return kept + conv + inner * (4 * _FP32_BYTES + 3 * p) + p * spec.width


_FP32_BYTES = 4


class _Segments:
    """Where segments begin, and which of the cache's states each one continues.

    One new token per sequence is the common case of generation: its rows are segments of their
    own, so that the blocks it did not choose cost nothing.
    """

    def __init__(self, rows: PackedRows, stream: TokenStream) -> None:
        self.batch_size = stream.batch_size
        if stream.length == 1:
            row = torch.arange(rows.tokens.shape[0] + 1, device=rows.tokens.device)
            self.numbers, self.cu_seqlens, self.max_seqlen = rows.segments, row.int(), 1
            self.of_row, self.index = row[:-1], torch.zeros_like(row[:-1])
        else:
            count = rows.cu_seqlens.shape[0] - 1
            self.numbers = torch.arange(count, device=rows.tokens.device)
            self.cu_seqlens, self.max_seqlen = rows.cu_seqlens, rows.max_seqlen
            self.of_row, self.index = rows.segments, rows.index_in_segment


class RecurrentState(State):
    """Convolution inputs and delta-rule states of every block of every sequence.

    Padding, and tokens that are routed elsewhere, leave them unchanged.

    Attributes:
        tensors: conv, (B, blocks, C, W - 1), the last inputs that each block saw; recurrent,
            (B, blocks, H, d_k, d_v), float32.
    """

    def read(self, name: str, segments: Tensor, num_sequences: int) -> Tensor:
        """Return the states of segments, (s,) int64, block * B + sequence -> (s, ...)."""
        return self.tensors[name][segments % num_sequences, segments // num_sequences]

    def write(self, name: str, segments: Tensor, num_sequences: int, value: Tensor) -> None:
        """Store value, (s, ...), as the states of segments that are all different."""
        tensor = self.tensors[name]
        tensor[segments % num_sequences, segments // num_sequences] = value.to(tensor.dtype)


class StaticRecurrentState(StaticState, RecurrentState):
    """conv and recurrent of all blocks, allocated at the start; zeros for what was not seen."""

    def __init__(
        self, spec: "BlockSpec", batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        heads, dim = spec.num_heads, spec.head_dim
        shape, exact = (batch_size, spec.num_blocks), torch.promote_types(dtype, torch.float32)
        conv = (*shape, 3 * heads * dim, CONV_WIDTH - 1)
        self.tensors = {
            "conv": torch.zeros(conv, dtype=dtype, device=device),
            "recurrent": torch.zeros(*shape, heads, dim, dim, dtype=exact, device=device),
        }


def head_errors(mixer: "GatedDeltaNet", samples: Sequence[AttentionSample]) -> Tensor:
    """Measure what a linear map of each head's gated read-out misses of the softmax head's output.

    Returns:
        (B, heads) float64, squared errors summed over the block's tokens.
    """
    heads, dim = samples[0].targets.shape[1:]
    blocks, device = samples[0].rows.num_blocks, samples[0].read.device
    # By head: gram of the read-out, its cross moment with the targets, gram of the targets.
    sums = torch.zeros(3, heads, blocks, dim, dim, dtype=torch.float64, device=device)
    for i in samples:
        have = mixer.heads(i.read, i.contexts.blocks(i.rows))
        for head, (x, y) in enumerate(zip(have.unbind(1), i.targets.unbind(1), strict=True)):
            for total, a, b in zip(sums[:, head], (x, x, y), (x, y, y), strict=True):
                add_cross_moments(total, a, b, i.rows.offsets)
    gram, cross, energy = sums
    fitted = ridge(gram, cross, SEARCH_PENALTY)
    error = energy - 2 * fitted @ cross + fitted @ gram @ fitted.mT
    return error.diagonal(dim1=-2, dim2=-1).sum(-1).mT


def _set_convolutions(
    mixer: "GatedDeltaNet", samples: Sequence[AttentionSample], count: int
) -> None:
    """Let convolutions pass the newest token on, scaled to INPUT_RMS."""
    for name in ("q", "k", "v"):
        weight, conv = getattr(mixer, f"{name}_proj"), getattr(mixer, f"{name}_conv")
        products = (grouped_linear(i.read, weight, i.rows) for i in samples)
        energy = torch.stack([product.square().sum() for product in products]).sum()
        conv.zero_()
        rms = (energy / (count * weight.shape[1])).sqrt()
        conv[..., -1] = INPUT_RMS / rms.clamp(min=1e-6)  # 0 where the parent's weights are


def _fit_norm_and_gate(
    mixer: "GatedDeltaNet", samples: Sequence[AttentionSample], count: int, regress: Regression
) -> None:
    """Set o_norm to the size of the targets, and fit the gate to how that varies.

    The gate is half constant, and half the norm of the softmax head's output over its mean, which
    the normalised read-out cannot follow: as far as a linear map of the input predicts it.
    """
    sizes = [i.targets.norm(dim=-1, keepdim=True) for i in samples]
    mean = (torch.stack([size.sum(0) for size in sizes]).sum(0) / count).clamp(min=1e-30)
    rms = (mean.mean() / math.sqrt(mixer.o_norm.shape[1])).clamp(min=1e-6)
    mixer.o_norm.copy_(rms.expand_as(mixer.o_norm))
    gates = (
        (i.read, ((1 + size / mean) / 2).expand_as(i.targets).flatten(1), i.rows.offsets)
        for i, size in zip(samples, sizes, strict=True)
    )
    mixer.g_proj.copy_(regress(gates))


def _search_decay_and_beta(
    mixer: "GatedDeltaNet", samples: Sequence[AttentionSample], constant: Tensor
) -> None:
    """Choose each head's half-life, then its beta, by `head_errors`. constant: (B, 1, d)."""

    def set_half_lives(values: Tensor) -> None:
        rate = (math.log(2.0) / values).to(mixer.dt_bias)
        mixer.dt_bias.copy_(torch.log(torch.expm1(rate)))

    def set_betas(values: Tensor) -> None:
        mixer.b_proj.copy_(torch.logit(values)[..., None] * constant)

    set_betas(torch.full_like(mixer.dt_bias, FIRST_BETA))
    for grid, setter in ((HALF_LIVES, set_half_lives), (BETAS, set_betas)):
        errors = []
        for value in grid:
            setter(torch.full_like(mixer.dt_bias, value))
            errors.append(head_errors(mixer, samples))
        best = torch.stack(errors).argmin(0)
        setter(torch.tensor(grid).to(mixer.dt_bias)[best])


def _first_tokens(samples: Sequence[AttentionSample], count: int) -> Iterator[AttentionSample]:
    """The inputs of the text's first `count` tokens."""
    for chunk in samples:
        if count <= 0:
            return
        yield chunk.first_tokens(count)
        count -= len(chunk.contexts.stream.document)
