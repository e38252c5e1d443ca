"""Gated DeltaNet blocks with stacked weights (arXiv 2412.06464)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molcli.kernels.gated_delta_rule import gated_delta_rule
from molcli.kernels.grouped_linear import grouped_linear, grouped_linears
from molcli.kernels.packed_rows import PackedRows
from molcli.kernels.qkv_conv import qkv_conv, short_conv_state
from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.decoding.cache import RecurrentState
from molcli.model.tokens import TokenStream

CONV_WIDTH = 4


class GatedDeltaNet(nn.Module):
    """The Gated DeltaNet of every block over its own rows.

    q, k and v pass a causal convolution and SiLU, q and k are brought to unit length; the read-out
    is normalised per head and gated by SiLU. There is no rotary embedding: order comes from the
    convolution and the decay, which advance with the block's own tokens.
    """

    def __init__(self, spec: BlockSpec, config: MoLConfig) -> None:
        super().__init__()
        self.eps, self.shape = config.rms_norm_eps, (spec.num_heads, spec.head_dim)
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

    def forward(
        self,
        x: Tensor,
        rows: PackedRows,
        rotary: tuple[Tensor, Tensor],
        stream: TokenStream,
        state: RecurrentState | None,
    ) -> Tensor:
        """x: (M, d) normalised rows -> (M, d). `rotary` is not used."""
        out = self.heads(x, rows, rotary, stream, state)
        return grouped_linear(out.flatten(1), self.o_proj, rows)

    def heads(
        self,
        x: Tensor,
        rows: PackedRows,
        rotary: tuple[Tensor, Tensor],
        stream: TokenStream,
        state: RecurrentState | None,
    ) -> Tensor:
        """Gated read-out before the output projection. x: (M, d) -> (M, h, head_dim)."""
        exact = torch.promote_types(x.dtype, torch.float32)
        places = _Places(rows, stream)
        qkv = torch.cat([self.q_proj, self.k_proj, self.v_proj], dim=1)
        mixed, gate = grouped_linears(x, (qkv, self.g_proj), rows)
        before = None if state is None else self._states(state, places, mixed)
        conv = None if before is None else before["conv"]
        filters = (self.q_conv, self.k_conv, self.v_conv)
        q, k, v = qkv_conv(mixed, filters, rows, places.of_row, places.index, conv, self.shape[1])
        a, b = (z.to(exact) for z in grouped_linears(x, (self.a_proj, self.b_proj), rows))
        decay = -rows.gather_per_block(self.A_log).to(exact).exp()
        g = decay * F.softplus(a + rows.gather_per_block(self.dt_bias).to(exact))
        recurrent = None if before is None else before["recurrent"]
        out, last = gated_delta_rule(
            q, k, v, g, b.sigmoid(), places.cu_seqlens, places.max_seqlen, recurrent
        )
        if state is not None and before is not None and last is not None:
            after = short_conv_state(mixed, places.cu_seqlens, before["conv"])
            state.write("conv", places.segments, stream.batch_size, after)
            state.write("recurrent", places.segments, stream.batch_size, last)
        gate = F.silu(gate).unflatten(1, self.shape)
        norm = out.to(exact) * torch.rsqrt(out.to(exact).square().mean(-1, keepdim=True) + self.eps)
        weight = rows.gather_per_block(self.o_norm)[:, None].to(gate.dtype)
        return norm.to(gate.dtype) * weight * gate

    def _states(self, state: RecurrentState, places: "_Places", mixed: Tensor) -> dict[str, Tensor]:
        """What the cache holds before every segment; zeros where it is new."""
        heads, dim = self.shape
        exact = torch.promote_types(mixed.dtype, torch.float32)
        sizes = {"conv": (mixed.shape[1], CONV_WIDTH - 1), "recurrent": (heads, dim, dim)}
        dtypes = {"conv": mixed.dtype, "recurrent": exact}
        batch, blocks = places.batch_size, self.A_log.shape[0]
        if not state.tensors:
            state.tensors = {
                n: mixed.new_zeros(batch, blocks, *s, dtype=dtypes[n]) for n, s in sizes.items()
            }
        return {n: state.read(n, places.segments, batch) for n in sizes}


class _Places:
    """Where segments begin, and which of the cache's states each one continues.

    One new token per sequence is the common case of generation: its rows are segments of their
    own, so that the blocks it did not choose cost nothing.
    """

    def __init__(self, rows: PackedRows, stream: TokenStream) -> None:
        self.batch_size = stream.batch_size
        if stream.length == 1:
            row = torch.arange(rows.tokens.shape[0] + 1, device=rows.tokens.device)
            self.segments, self.cu_seqlens, self.max_seqlen = rows.segments, row.int(), 1
            self.of_row, self.index = row[:-1], torch.zeros_like(row[:-1])
        else:
            count = rows.cu_seqlens.shape[0] - 1
            self.segments = torch.arange(count, device=rows.tokens.device)
            self.cu_seqlens, self.max_seqlen = rows.cu_seqlens, rows.max_seqlen
            self.of_row, self.index = rows.segments, rows.index_in_segment
