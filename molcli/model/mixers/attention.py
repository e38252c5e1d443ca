"""Causal softmax attention with rotary positions, for the stacked weights of B blocks."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molcli.kernels.grouped_linear import grouped_linear, grouped_linears
from molcli.kernels.indexed_linear import indexed_linear
from molcli.kernels.packed_rows import PackedRows
from molcli.kernels.segment_attention import segment_attention
from molcli.kernels.step_attention import step_append, step_attend
from molcli.model.mixers.base import (
    BlockContext,
    CacheLength,
    Mixer,
    State,
    StaticState,
    StepContext,
)
from molcli.model.norms import rms_norm
from molcli.model.tokens import TokenStream

if TYPE_CHECKING:
    from molcli.model.configuration_mol import BlockSpec, MoLConfig


class Attention(Mixer):
    """Softmax attention of every block over its own rows (arXiv 1706.03762), rotary positions
    (arXiv 2104.09864), grouped queries (arXiv 2305.13245)."""

    name = "attention"
    shares_kv_heads = True

    def __init__(self, spec: "BlockSpec", config: "MoLConfig") -> None:
        super().__init__(spec, config)
        self.window, self.qk_norm_full_width = spec.window, config.qk_norm_full_width
        # With a second rotary base, its cosines and sines stand behind the first's.
        self.rotary_bases = 1 if config.rope_theta_local is None else 2
        self.rotary_base = int(spec.local_rotary)
        b, d = spec.num_blocks, spec.width
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Parameter(torch.empty(b, q, d))
        self.k_proj = nn.Parameter(torch.empty(b, kv, d))
        self.v_proj = nn.Parameter(torch.empty(b, kv, d))
        self.o_proj = nn.Parameter(torch.empty(b, d, q))
        for name, size, wanted in (
            ("q_bias", q, config.attention_bias),
            ("k_bias", kv, config.attention_bias),
            ("v_bias", kv, config.attention_bias),
            ("o_bias", d, config.attention_out_bias),
            ("q_norm", q if config.qk_norm_full_width else spec.head_dim, config.qk_norm),
            ("k_norm", kv if config.qk_norm_full_width else spec.head_dim, config.qk_norm),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(b, size)) if wanted else None)
        self.q_bias: nn.Parameter | None
        self.k_bias: nn.Parameter | None
        self.v_bias: nn.Parameter | None
        self.o_bias: nn.Parameter | None
        self.q_norm: nn.Parameter | None
        self.k_norm: nn.Parameter | None

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """Mix the rows: (M, width) -> (M, width)."""
        heads = self.heads(x, context)
        return grouped_linear(heads.flatten(1), self.o_proj, context.rows, self.o_bias)

    def heads(self, x: Tensor, context: BlockContext) -> Tensor:
        """Compute the heads' outputs, before the output projection.

        Args:
            x: (M, width), normalised rows.

        Returns:
            (M, num_heads, head_dim).
        """
        rows, stream, state = context.rows, context.stream, context.state
        weights = (self.q_proj, self.k_proj, self.v_proj)
        biases = (self.q_bias, self.k_bias, self.v_bias)
        q, k, v = grouped_linears(x, weights, rows, biases)
        if self.qk_norm_full_width:
            q, k = self._norm_full_width(q, k, rows.gather_per_block)
        q, k, v = (z.unflatten(1, (-1, self.head_dim)) for z in (q, k, v))
        if not self.qk_norm_full_width and self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, rows.gather_per_block(self.q_norm)[:, None], self.eps)
            k = rms_norm(k, rows.gather_per_block(self.k_norm)[:, None], self.eps)
        cos, sin = (rows.gather(self._of_own_base(x)) for x in context.rotary)
        q, k, v = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v
        if state is not None:
            assert isinstance(state, AttentionState)
            fresh = state.empty
            state.append(k, v, rows, stream)
            if not fresh:
                return state.attend(q, rows, stream, self.window)
        if self.window is None or stream.length <= self.window:
            return segment_attention(q, k, v, rows)
        return segment_attention(q, k, v, rows, self.window, stream.time[rows.tokens])

    def step(self, x: Tensor, norm: Tensor | None, context: StepContext) -> Tensor:
        """Append keys and values to the static cache and attend: (R, width) -> (R, width)."""
        rows, state = context.rows, context.state
        weights = [self.q_proj, self.k_proj, self.v_proj]
        projected = indexed_linear(x, list(weights), rows, norm=norm, eps=self.eps)
        biases = [b for b in (self.q_bias, self.k_bias, self.v_bias) if b is not None]
        norms = [w for w in (self.q_norm, self.k_norm) if w is not None]
        if self.qk_norm_full_width:  # the kernel normalises head by head
            q, k, v = projected.split([w.shape[1] for w in weights], dim=-1)
            if biases:
                q, k, v = (z + b[rows.blocks] for z, b in zip((q, k, v), biases, strict=True))
            q, k = self._norm_full_width(q, k, lambda weight: weight[rows.blocks])
            projected, biases, norms = torch.cat([q, k, v], dim=-1), [], []
        cache = [state.tensors[name] for name in ("keys", "values", "blocks")]
        filled, num_heads = context.length.filled, self.q_proj.shape[1] // self.head_dim
        q = step_append(
            projected,
            biases,
            norms,
            *(self._of_own_base(x).contiguous() for x in context.rotary),
            *cache,
            filled,
            rows.blocks,
            context.active,
            num_heads,
            self.eps,
        )
        window = self.window or 0
        heads = step_attend(q, *cache, filled, rows.blocks, rows.num_blocks, window)
        return indexed_linear(heads, [self.o_proj], rows, bias=self.o_bias)

    def _norm_full_width(
        self, q: Tensor, k: Tensor, per_row: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """RMSNorm over all heads of a block. per_row: (B, ...), a block's -> (M, ...), a row's."""
        assert self.q_norm is not None and self.k_norm is not None
        q = rms_norm(q, per_row(self.q_norm), self.eps)
        return q, rms_norm(k, per_row(self.k_norm), self.eps)

    def _of_own_base(self, x: Tensor) -> Tensor:
        """Cosines or sines (n, bases * channels) -> (n, channels), of this layer's rotary base."""
        return x if self.rotary_bases == 1 else x.chunk(2, dim=-1)[self.rotary_base]

    @staticmethod
    def new_state(spec: "BlockSpec") -> State:
        """Make an empty `AttentionState`."""
        return AttentionState()

    @staticmethod
    def new_static_state(
        spec: "BlockSpec",
        slots: int,
        length: CacheLength,
        dtype: torch.dtype,
        device: torch.device,
    ) -> StaticState:
        """Make an empty `StaticAttentionState`."""
        return StaticAttentionState(spec, slots, length, dtype, device)

    @staticmethod
    def count_parameters(spec: "BlockSpec", config: "MoLConfig") -> int:
        """Count projections, biases and norms of queries and keys."""
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        weights = 2 * (q + kv) * spec.width  # q and o, k and v
        biases = config.attention_bias * (q + 2 * kv) + config.attention_out_bias * spec.width
        norms = q + kv if config.qk_norm_full_width else 2 * spec.head_dim
        return weights + biases + config.qk_norm * norms

    @staticmethod
    def count_flops(spec: "BlockSpec", tokens: float) -> tuple[float, float]:
        """Count projections, and 4 * head_dim a head and key: a token sees (tokens + 1) / 2."""
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        return 4.0 * (q + kv) * spec.width, 4 * q * (tokens + 1) / 2

    @staticmethod
    def activation_bytes(spec: "BlockSpec", product_bytes: int, compiled: bool) -> int:
        """Estimate rotated queries and keys, values and outputs; compiled attention keeps keys and
        values for every head."""
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        return product_bytes * (4 * q if compiled else 2 * q + 2 * kv)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions (arXiv 2104.09864), halves convention, to the first channels.

    Args:
        x: (M, h, head_dim).
        cos, sin: (M, channels that rotate).

    Returns:
        (M, h, head_dim).
    """
    rotated_channels = cos.shape[-1]
    if rotated_channels < x.shape[-1]:
        rotated = rotate(x[..., :rotated_channels], cos, sin)
        return torch.cat([rotated, x[..., rotated_channels:]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)


class AttentionState(State):
    """Keys and values by (sequence, time, slot).

    Every token fills as many slots as it visits blocks, so that the tensors stay dense although the
    blocks' own histories are ragged.

    Attributes:
        tensors: keys and values, (B, T, slots, kv, head_dim); blocks, (B, T, slots) int, -1 at
            padding.
    """

    @property
    def empty(self) -> bool:
        """Whether no token has been seen."""
        return not self.tensors

    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and blocks of all tokens up to the last one that was appended."""
        return self.tensors["keys"], self.tensors["values"], self.tensors["blocks"]

    def append(self, k: Tensor, v: Tensor, rows: PackedRows, stream: TokenStream) -> None:
        """Add the rows of the new tokens. k, v: (M, kv, head_dim)."""
        new = {
            "keys": _by_slot(k, rows, stream, fill=0),
            "values": _by_slot(v, rows, stream, fill=0),
            "blocks": _by_slot(rows.blocks, rows, stream, fill=-1),
        }
        self.extend(new)

    def extend(self, new: dict[str, Tensor]) -> None:
        """Add tensors of new tokens, (B, T', slots, ...) each, behind those that are held."""
        old = self.tensors
        self.tensors = {n: torch.cat([old[n], x], 1) if old else x for n, x in new.items()}

    def attend(
        self, q: Tensor, rows: PackedRows, stream: TokenStream, window: int | None = None
    ) -> Tensor:
        """Attend to everything held: a row sees the keys of its own block and sequence, up to its
        own time.

        Args:
            q: (M, h, head_dim), rows of the newest tokens.
            window: how many of the latest tokens a row sees; None for all of them.

        Returns:
            (M, h, head_dim).
        """
        keys, values, blocks = self.held()
        query = _by_slot(q, rows, stream, fill=0)  # (B, T', slots, h, d)
        query_block = _by_slot(rows.blocks, rows, stream, fill=-1)
        total, new = keys.shape[1], query.shape[1]
        time = torch.arange(total, device=q.device)
        distance = time[total - new :, None] - time[None, :]  # (T', T)
        earlier = distance >= 0
        if window is not None:
            earlier = earlier & (distance < window)
        same = query_block[:, :, :, None, None] == blocks[:, None, None]  # (B, T', s, T, s)
        visible = same & earlier[:, None, :, None]
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, keys, values))
        mask = visible.flatten(3, 4).flatten(1, 2)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        out = out.transpose(1, 2).unflatten(1, query.shape[1:3])
        return out[stream.sequence[rows.tokens], stream.time[rows.tokens], rows.slots]


class StaticAttentionState(StaticState, AttentionState):
    """Keys and values in tensors of fixed size, filled up to the cache's length.

    Attributes:
        tensors: keys and values, (B, L, slots, kv, head_dim); blocks, (B, L, slots) int32.
    """

    def __init__(
        self,
        spec: "BlockSpec",
        slots: int,
        length: CacheLength,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.length, shape = length, (len(length.counts), length.length, slots)
        heads = (spec.num_kv_heads, spec.head_dim)
        self.tensors = {
            "keys": torch.zeros(*shape, *heads, dtype=dtype, device=device),
            "values": torch.zeros(*shape, *heads, dtype=dtype, device=device),
            "blocks": torch.full(shape, -1, dtype=torch.int32, device=device),
        }
        self.end = 0

    @property
    def empty(self) -> bool:
        """Whether no token has been seen."""
        return self.length.seen == 0

    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the filled part of keys, values and blocks."""
        keys, values, blocks = (
            self.tensors[n][:, : self.end] for n in ("keys", "values", "blocks")
        )
        return keys, values, blocks

    def extend(self, new: dict[str, Tensor]) -> None:
        """Write tensors of new tokens, (B, T', slots, ...) each, behind the filled part."""
        start = self.length.seen
        self.end = start + new["keys"].shape[1]
        for name, tensor in new.items():
            self.tensors[name][:, start : self.end] = tensor

    def narrow(self, indices: Tensor) -> None:
        """Keep sequences `indices` alone; of them, copy what is filled."""
        for name, tensor in self.tensors.items():
            kept = self.tensors[name] = tensor[: len(indices)]
            kept[:, : self.length.seen] = tensor[:, : self.length.seen][indices]

    def reset(self) -> None:
        """Do nothing: entries past the cache's length are never read."""


def _by_slot(x: Tensor, rows: PackedRows, stream: TokenStream, fill: int) -> Tensor:
    """x: (M, ...) -> (batch, length, slots, ...)."""
    shape = (stream.batch_size, stream.length, rows.num_slots, *x.shape[1:])
    place = stream.sequence[rows.tokens], stream.time[rows.tokens], rows.slots
    return x.new_full(shape, fill).index_put(place, x)
