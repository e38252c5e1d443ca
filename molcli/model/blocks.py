"""B independent pre-norm Transformer blocks with stacked weights, run side by side on rows."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from molcli.kernels.grouped_linear import grouped_linear, grouped_linears
from molcli.kernels.packed_rows import PackedRows
from molcli.kernels.segment_attention import segment_attention
from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.decoding.cache import AttentionState, RecurrentState
from molcli.model.mixers.gated_deltanet import GatedDeltaNet
from molcli.model.tokens import TokenStream


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: (..., d), weight: broadcastable; the mean square is taken in float32 or higher."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return weight * exact.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves convention. x: (M, h, d), cos and sin: (M, r), for the first r."""
    turning = cos.shape[-1]
    if turning < x.shape[-1]:
        return torch.cat([rotate(x[..., :turning], cos, sin), x[..., turning:]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)


class Attention(nn.Module):
    """Causal softmax attention of every block over its own rows, with rotary positions."""

    def __init__(self, spec: BlockSpec, config: MoLConfig) -> None:
        super().__init__()
        self.head_dim, self.eps, self.window = spec.head_dim, config.rms_norm_eps, spec.window
        # Of each rotary base there are cosines and sines, side by side: the local base's last.
        self.rotary_bases = 1 if config.rope_theta_local is None else 2
        self.rotary_base = int(spec.local_rotary)
        self.qk_norm_full_width = config.qk_norm_full_width
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

    def forward(
        self,
        x: Tensor,
        rows: PackedRows,
        rotary: tuple[Tensor, Tensor],
        stream: TokenStream,
        state: AttentionState | None,
    ) -> Tensor:
        """x: (M, d) normalised rows; rotary: cos and sin, (n, bases * r) -> (M, d)."""
        out = self.heads(x, rows, rotary, stream, state)
        return grouped_linear(out.flatten(1), self.o_proj, rows, self.o_bias)

    def heads(
        self,
        x: Tensor,
        rows: PackedRows,
        rotary: tuple[Tensor, Tensor],
        stream: TokenStream,
        state: AttentionState | None,
    ) -> Tensor:
        """What the heads read, before the output projection. x: (M, d) -> (M, h, head_dim)."""
        weights = (self.q_proj, self.k_proj, self.v_proj)
        biases = (self.q_bias, self.k_bias, self.v_bias)
        q, k, v = grouped_linears(x, weights, rows, biases)
        if self.qk_norm_full_width:
            q, k = self.norm_full_width(q, k, rows.per_row)
        q, k, v = (z.unflatten(1, (-1, self.head_dim)) for z in (q, k, v))
        if not self.qk_norm_full_width and self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, rows.per_row(self.q_norm)[:, None], self.eps)
            k = rms_norm(k, rows.per_row(self.k_norm)[:, None], self.eps)
        cos, sin = (rows.gather(self.of_own_base(x)) for x in rotary)
        q, k, v = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v
        fresh = state is None or state.empty
        if state is not None:
            state.append(k, v, rows, stream)
            if not fresh:
                return state.attend(q, rows, stream, self.window)
        if self.window is None or stream.length <= self.window:
            return segment_attention(q, k, v, rows)
        return segment_attention(q, k, v, rows, self.window, stream.time[rows.tokens])

    def norm_full_width(
        self, q: Tensor, k: Tensor, per_row: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """RMSNorm over all heads of a block. q: (M, h * head_dim), k: (M, kv * head_dim).

        per_row: gives each row its block's weight, (B, ...) -> (M, ...).
        """
        assert self.q_norm is not None and self.k_norm is not None
        q = rms_norm(q, per_row(self.q_norm), self.eps)
        return q, rms_norm(k, per_row(self.k_norm), self.eps)

    def of_own_base(self, x: Tensor) -> Tensor:
        """x: cosines or sines, (n, bases * r) -> (n, r), those of this layer's rotary base."""
        return x if self.rotary_bases == 1 else x.chunk(2, dim=-1)[self.rotary_base]


class FeedForward(nn.Module):
    """The feed-forward network of every block: gated (SwiGLU-like) or two matrices."""

    def __init__(self, spec: BlockSpec, config: MoLConfig) -> None:
        super().__init__()
        b, d, f = spec.num_blocks, spec.width, spec.d_ff
        gate = nn.Parameter(torch.empty(b, f, d)) if config.mlp_gated else None
        self.register_parameter("gate_proj", gate)
        self.gate_proj: nn.Parameter | None
        self.up_proj = nn.Parameter(torch.empty(b, f, d))
        self.down_proj = nn.Parameter(torch.empty(b, d, f))
        self.activation_name = config.hidden_act
        self.activation = ACT2FN[self.activation_name]

    def forward(self, x: Tensor, rows: PackedRows) -> Tensor:
        """x: (M, d) -> (M, d)."""
        return grouped_linear(self.neurons(x, rows), self.down_proj, rows)

    def neurons(self, x: Tensor, rows: PackedRows) -> Tensor:
        """The hidden activations. x: (M, d) -> (M, d_ff)."""
        if self.gate_proj is None:
            return self.activation(grouped_linear(x, self.up_proj, rows))
        gate, up = grouped_linears(x, (self.gate_proj, self.up_proj), rows)
        return self.activation(gate) * up


class BlockStack(nn.Module):
    """What x + mixer(norm(x)), then + mlp(norm(.)), adds to x, for every block on its own rows.

    With output norms, mixer and mlp add an RMSNorm of their output. Norms that the configuration
    leaves out are None.
    """

    def __init__(self, spec: BlockSpec, config: MoLConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        shape = spec.num_blocks, spec.width
        for name, wanted in (
            ("input_norm", config.pre_norms),
            ("post_norm", config.pre_norms),
            ("mixer_out_norm", spec.output_norms),
            ("mlp_out_norm", spec.output_norms),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(shape)) if wanted else None)
        self.input_norm: nn.Parameter | None
        self.post_norm: nn.Parameter | None
        self.mixer_out_norm: nn.Parameter | None
        self.mlp_out_norm: nn.Parameter | None
        self.mixer: Attention | GatedDeltaNet
        if spec.mixer == "gated_deltanet":
            self.mixer = GatedDeltaNet(spec, config)
        else:
            self.mixer = Attention(spec, config)
        self.mlp = FeedForward(spec, config)

    def forward(
        self,
        x: Tensor,
        rows: PackedRows,
        rotary: tuple[Tensor, Tensor],
        stream: TokenStream,
        state: AttentionState | RecurrentState | None,
    ) -> Tensor:
        """x: (M, width) residual rows -> (M, width), what the block adds to them."""
        mixed = self.mix(x, rows, rotary, stream, state)
        return mixed + self.feed(x + mixed, rows)

    def mix(
        self,
        x: Tensor,
        rows: PackedRows,
        rotary: tuple[Tensor, Tensor],
        stream: TokenStream,
        state: AttentionState | RecurrentState | None,
    ) -> Tensor:
        """What the mixer adds to x (M, width)."""
        mixed = self.mixer(self.norm(x, self.input_norm, rows), rows, rotary, stream, state)
        return self.norm(mixed, self.mixer_out_norm, rows)

    def feed(self, x: Tensor, rows: PackedRows) -> Tensor:
        """What the FFN adds to x (M, width), in which the mixer's share is already."""
        return self.norm(
            self.mlp(self.norm(x, self.post_norm, rows), rows), self.mlp_out_norm, rows
        )

    def norm(self, x: Tensor, weight: Tensor | None, rows: PackedRows) -> Tensor:
        """RMSNorm with each block's own weight; x itself without one. x: (M, width)."""
        return x if weight is None else rms_norm(x, rows.per_row(weight), self.eps)
