"""Dense layers, and layers that are a mixture of thin blocks."""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.packed_rows import PackedRows, all_rows, routed_rows
from molcli.model.blocks import BlockStack
from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.decoding.cache import AttentionState, MoLCacheLayer, RecurrentState
from molcli.model.routing.router import Router, Routing
from molcli.model.tokens import TokenStream


class ThinBlocks(nn.Module):
    """B thin blocks: x -> thin_out(block(thin_in x) - thin_in x) (arXiv 2605.09516, section 3).

    The paper's subtraction strips the thin residual: a block returns only what it computed. Here
    the block sums what it computed in the first place; in bf16 the difference of two large
    residuals would lose it.
    """

    def __init__(self, spec: BlockSpec, config: MoLConfig) -> None:
        super().__init__()
        b, d = spec.num_blocks, config.hidden_size
        self.thin_in = nn.Parameter(torch.empty(b, spec.width, d))
        self.thin_out = nn.Parameter(torch.empty(b, d, spec.width))
        self.block = BlockStack(spec, config)

    def forward(
        self,
        x: Tensor,
        rows: PackedRows,
        gate: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        stream: TokenStream,
        state: AttentionState | RecurrentState | None,
    ) -> Tensor:
        """x: (n, d_model); gate: (M,) a weight per row or None -> (M, d_model), for `rows.combine`.

        The gate is applied at the thin width, where it is cheapest: thin_out is linear.
        """
        thin = grouped_linear(rows.gather(x), self.thin_in, rows)
        delta = self.block(thin, rows, rotary, stream, state)
        if gate is not None:
            delta = delta * gate[:, None].to(delta.dtype)
        return grouped_linear(delta, self.thin_out, rows)


class DenseLayer(GradientCheckpointingLayer):
    """An ordinary pre-norm Transformer layer: a stack of one block at full width."""

    def __init__(self, config: MoLConfig, kind: str = "dense", layer: int = 0) -> None:
        super().__init__()
        self.block = BlockStack(config.dense_spec(kind, layer), config)

    def forward(
        self,
        x: Tensor,
        rows: PackedRows,
        rotary: tuple[Tensor, Tensor],
        stream: TokenStream,
        states: MoLCacheLayer | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """x: (n, d_model), rows: all tokens once."""
        return x + self.block(x, rows, rotary, stream, states and states.always), None


class MoLLayer(GradientCheckpointingLayer):
    """x + shared blocks + 1/K sum of w_i block_i over the K routed blocks of each token."""

    def __init__(self, config: MoLConfig, layer: int) -> None:
        super().__init__()
        self.top_k, self.restrict_attention = config.num_blocks_per_tok, config.restrict_attention
        self.shared = self.routed = self.router = None
        if config.num_shared_blocks:
            self.shared = ThinBlocks(config.shared_spec(layer), config)
        if config.num_routed_blocks:
            self.routed = ThinBlocks(config.routed_spec(layer), config)
            self.router = Router(config.hidden_size, config.num_routed_blocks, self.top_k)

    def forward(
        self,
        x: Tensor,
        rows: PackedRows,
        rotary: tuple[Tensor, Tensor],
        stream: TokenStream,
        states: MoLCacheLayer | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """x: (n, d_model), rows: all tokens in every shared block."""
        out, routing = x, None
        if self.shared is not None:
            out = self.with_shared(x, rows, rotary, stream, states)
        if self.routed is not None:
            found, routed, routing = self.routed_rows(x, rotary, stream, states)
            out = out + routed.combine(found)
        return out, routing

    def with_shared(
        self,
        x: Tensor,
        rows: PackedRows,
        rotary: tuple[Tensor, Tensor],
        stream: TokenStream,
        states: MoLCacheLayer | None,
    ) -> Tensor:
        """x + shared blocks, (n, d_model). Needs nothing of the routed blocks, nor they of it."""
        assert self.shared is not None
        found = self.shared(x, rows, None, rotary, stream, states and states.always)
        return x + rows.combine(found)

    def routed_rows(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        stream: TokenStream,
        states: MoLCacheLayer | None,
    ) -> tuple[Tensor, PackedRows, Routing]:
        """What every routed block computes of its tokens, w / K times: (M, d_model), for these
        rows to combine."""
        assert self.routed is not None and self.router is not None
        routing = self.router(x)
        rows, gate = self.route(routing, stream)
        found = self.routed(x, rows, gate, rotary, stream, states and states.routed)
        return found, rows, routing

    def route(self, routing: Routing, stream: TokenStream) -> tuple[PackedRows, Tensor]:
        """The rows of the routed blocks, and w / K for each."""
        count = routing.logits.shape[1]
        weights = routing.weights / self.top_k
        sizes = (stream.document, stream.num_documents, count, stream.length)
        if self.restrict_attention:
            rows = routed_rows(routing.blocks, *sizes)
        else:
            rows = all_rows(*sizes)
            weights = torch.zeros_like(routing.logits).scatter(1, routing.blocks, weights)
        return rows, rows.gather_slots(weights)


Layer = DenseLayer | MoLLayer


def new_layer(config: MoLConfig, index: int) -> Layer:
    """Layer `index`, of the kind that the configuration says."""
    if config.is_dense(index):
        return DenseLayer(config, config.layer_kinds[index], index)
    return MoLLayer(config, index)
