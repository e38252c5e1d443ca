"""Layers: dense, mixtures of thin blocks (arXiv 2605.09516, section 3), sliced, and skipped."""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from molcli.kernels.decode_rows import DecodeRows, all_decode_rows, routed_decode_rows
from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.indexed_combine import indexed_combine
from molcli.kernels.indexed_linear import indexed_linear
from molcli.kernels.packed_rows import PackedRows, all_rows, routed_rows
from molcli.kernels.route import route
from molcli.model.blocks import BlockStack, FeedForward
from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.context import DecodeContext, ForwardContext
from molcli.model.decoding.cache import MoLCacheLayer
from molcli.model.mixers import BlockContext, StepContext
from molcli.model.norms import rms_norm
from molcli.model.routing.router import Router, Routing
from molcli.model.tokens import TokenStream


class ThinBlocks(nn.Module):
    """B thin blocks: x -> thin_out(block(thin_in x) - thin_in x) (arXiv 2605.09516, section 3).

    The paper's subtraction removes the thin residual: a block returns only what it computed. Here a
    block sums what it computed in the first place; in bf16 the difference of two large residuals
    would lose it.
    """

    def __init__(self, spec: BlockSpec, config: MoLConfig) -> None:
        super().__init__()
        b, d = spec.num_blocks, config.hidden_size
        self.thin_in = nn.Parameter(torch.empty(b, spec.width, d))
        self.thin_out = nn.Parameter(torch.empty(b, d, spec.width))
        self.block = BlockStack(spec, config)

    def forward(self, x: Tensor, gate: Tensor | None, context: BlockContext) -> Tensor:
        """Compute what every block adds to the residual of its tokens.

        Args:
            x: (n, d_model), the residual.
            gate: (M,), a weight for each row, or None. It is applied at the thin width, where it is
                cheapest: thin_out is linear.

        Returns:
            (M, d_model), for `PackedRows.combine`.
        """
        rows = context.rows
        thin = grouped_linear(rows.gather(x), self.thin_in, rows)
        delta = self.block(thin, context)
        if gate is not None:
            delta = delta * gate[:, None].to(delta.dtype)
        return grouped_linear(delta, self.thin_out, rows)

    def step(self, x: Tensor, context: StepContext) -> Tensor:
        """Compute what the blocks add to their thin residuals in a decoding step.

        Args:
            x: (B, d_model), the residual of the new tokens.

        Returns:
            (R, d_thin). `indexed_combine` with thin_out brings it to the full width.
        """
        thin = indexed_linear(x, [self.thin_in], context.rows)
        return self.block.step(thin, context)


class DenseLayer(GradientCheckpointingLayer):
    """A pre-norm Transformer layer: a stack of one block at full width."""

    def __init__(self, config: MoLConfig, mixer: str = "attention", index: int = 0) -> None:
        super().__init__()
        self.block = BlockStack(config.dense_spec(mixer, index), config)

    def forward(
        self, x: Tensor, context: ForwardContext, states: MoLCacheLayer | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Compute the residual after the layer.

        Args:
            x: (n, d_model), the residual before it.
            states: what the layer remembers, or None without a cache.

        Returns:
            (n, d_model), and None: nothing is routed.
        """
        return context.schedule.run(DenseLayer.add_block, self, x, context, states), None

    def add_block(self, x: Tensor, context: ForwardContext, states: MoLCacheLayer | None) -> Tensor:
        """Compute x + block(x), (n, d_model)."""
        blocks = context.blocks(context.dense_rows, None if states is None else states.always)
        return x + self.block(x, blocks)

    def step(
        self, x: Tensor, context: DecodeContext, states: MoLCacheLayer
    ) -> tuple[Tensor, Routing | None]:
        """Compute the residual, (B, d_model), after a decoding step."""
        return x + self.block.step(x, context.blocks(context.always[1], states.always)), None


class MoLLayer(GradientCheckpointingLayer):
    """A mixture of thin blocks: x + shared blocks + 1/K sum of w_i block_i over a token's K blocks.

    Shared and routed blocks are independent and may run concurrently.
    """

    def __init__(self, config: MoLConfig, mixer: str, index: int = 0) -> None:
        super().__init__()
        self.top_k, self.restrict_attention = config.num_blocks_per_tok, config.restrict_attention
        self.shared = self.routed = self.router = None
        if config.num_shared_blocks:
            self.shared = ThinBlocks(config.shared_spec(index), config)
        if config.num_routed_blocks:
            self.routed = ThinBlocks(config.routed_spec(mixer, index), config)
            self.router = Router(config.hidden_size, config.num_routed_blocks, self.top_k)

    def forward(
        self, x: Tensor, context: ForwardContext, states: MoLCacheLayer | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Compute the residual after the layer.

        Args:
            x: (n, d_model), the residual before it.
            states: what the layer remembers, or None without a cache.

        Returns:
            (n, d_model), and the routing of the n tokens, or None without routed blocks.
        """
        schedule, kept = context.schedule, x
        # A concurrent schedule frees memory on one stream that the other may still read. What
        # `add_shared` reads exists before it starts, and this frame holds it until `join`. Its
        # result is freed after it is read here; `aside` writes again only after it has waited for
        # this stream.
        if self.shared is not None:
            kept = schedule.aside(MoLLayer.add_shared, self, x, context, states)
        if self.routed is None:
            schedule.join()
            return kept, None
        found, rows, routing = schedule.run(MoLLayer.run_routed, self, x, context, states)
        schedule.join()
        return schedule.run(_add_rows, kept, found, rows), routing

    def add_shared(
        self, x: Tensor, context: ForwardContext, states: MoLCacheLayer | None
    ) -> Tensor:
        """Compute x + shared blocks, (n, d_model)."""
        assert self.shared is not None
        rows = context.shared_rows
        return x + rows.combine(
            self.shared(x, None, context.blocks(rows, None if states is None else states.always))
        )

    def run_routed(
        self, x: Tensor, context: ForwardContext, states: MoLCacheLayer | None
    ) -> tuple[Tensor, PackedRows, Routing]:
        """Route the tokens and run the chosen blocks.

        Returns:
            (M, d_model), each row scaled by its weight over K; the rows; the routing.
        """
        assert self.routed is not None and self.router is not None
        routing = self.router(x)
        rows, gate = self.route(routing, context.stream)
        blocks = context.blocks(rows, None if states is None else states.routed)
        return self.routed(x, gate, blocks), rows, routing

    def route(self, routing: Routing, stream: TokenStream) -> tuple[PackedRows, Tensor]:
        """Lay out the rows of the routed blocks.

        Returns:
            The M rows, and for each its weight divided by K, (M,).
        """
        count = routing.logits.shape[1]
        weights = routing.weights / self.top_k
        sizes = (stream.document, stream.num_documents, count, stream.length)
        if self.restrict_attention:
            rows = routed_rows(routing.blocks, *sizes)
        else:
            rows = all_rows(*sizes)
            weights = torch.zeros_like(routing.logits).scatter(1, routing.blocks, weights)
        return rows, rows.gather_per_slot(weights)

    def step(
        self, x: Tensor, context: DecodeContext, states: MoLCacheLayer
    ) -> tuple[Tensor, Routing | None]:
        """Compute the residual, (B, d_model), after a decoding step, and the routing."""
        schedule, kept = context.schedule, x
        if self.shared is not None:
            kept = schedule.aside(MoLLayer.add_shared_step, self, x, context, states)
        if self.routed is None:
            schedule.join()
            return kept, None
        routing, rows, weights = self.route_step(x)
        delta = self.routed.step(x, context.blocks(rows, states.routed))
        schedule.join()
        scale = 1 / self.top_k
        out = indexed_combine(delta, self.routed.thin_out, rows, weights, kept, scale=scale)
        return out, routing

    def add_shared_step(self, x: Tensor, context: DecodeContext, states: MoLCacheLayer) -> Tensor:
        """Compute x + shared blocks, (B, d_model), in a decoding step."""
        assert self.shared is not None
        rows = context.always[self.shared.thin_in.shape[0]]
        delta = self.shared.step(x, context.blocks(rows, states.always))
        return indexed_combine(delta, self.shared.thin_out, rows, None, x)

    def route_step(self, x: Tensor) -> tuple[Routing, DecodeRows, Tensor]:
        """Route one new token a sequence: x, (B, d_model) -> routing, rows, (B, slots) weights."""
        assert self.router is not None
        weight, bias = self.router.weight, self.router.correction_bias
        routing = Routing(*route(x, weight, bias, self.top_k))
        count = weight.shape[0]
        if self.restrict_attention:
            return routing, routed_decode_rows(routing.blocks, count), routing.weights
        weights = torch.zeros_like(routing.logits).scatter(1, routing.blocks, routing.weights)
        return routing, all_decode_rows(len(x), count, x.device), weights


def _add_rows(kept: Tensor, found: Tensor, rows: PackedRows) -> Tensor:
    """kept: (n, d_model), found: (M, d_model) rows -> (n, d_model)."""
    return kept + rows.combine(found)


class SlicedLayer(GradientCheckpointingLayer):
    """A layer at full width whose neurons are divided into slices.

    Its mixer and the shared slice run on every token. Of the routed slices, K run on a token. They
    have neurons only, and read what the shared slice reads: the residual after the mixer. A chosen
    slice adds its output as it is, not scaled by its weight, so that the slices of a trained
    parent keep their size: its factor is w / stop-gradient(w), which is 1 and has the gradient of
    log w.
    """

    def __init__(self, config: MoLConfig, mixer: str, index: int = 0) -> None:
        super().__init__()
        self.block = BlockStack(config.sliced_spec(mixer, index), config)
        self.slices = self.router = None
        if config.num_routed_blocks:
            self.slices = FeedForward(config.slices_spec(index), config)
            size = config.hidden_size, config.num_routed_blocks
            self.router = Router(*size, config.num_blocks_per_tok)

    def forward(
        self, x: Tensor, context: ForwardContext, states: MoLCacheLayer | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Compute the residual after the layer.

        Args:
            x: (n, d_model), the residual before it.
            states: what the layer remembers, or None without a cache.

        Returns:
            (n, d_model), and the routing of the n tokens, or None without routed slices.
        """
        found: tuple[Tensor, Routing | None] = context.schedule.run(
            SlicedLayer.run, self, x, context, states
        )
        return found

    def run(
        self, x: Tensor, context: ForwardContext, states: MoLCacheLayer | None
    ) -> tuple[Tensor, Routing | None]:
        """Compute `forward`."""
        rows, block = context.dense_rows, self.block
        x = x + block.mix(x, context.blocks(rows, None if states is None else states.always))
        read = block.norm(x, block.post_norm, rows)
        added = block.mlp(read, rows)
        routing = None
        if self.slices is not None and self.router is not None:
            # A router that is kept as it is passes no gradient on to the residual either.
            trains = self.router.weight.requires_grad
            routing = self.router(x if trains else x.detach())
            added = added + self.run_slices(read, routing, context.stream)
        return x + block.norm(added, block.mlp_out_norm, rows), routing

    def rows_of_slices(self, routing: Routing, stream: TokenStream) -> PackedRows:
        """Lay out the rows of the routed slices."""
        sizes = stream.document, stream.num_documents, routing.logits.shape[1], stream.length
        return routed_rows(routing.blocks, *sizes)

    def run_slices(self, read: Tensor, routing: Routing, stream: TokenStream) -> Tensor:
        """Sum the chosen slices of each token. read: (n, d_model) -> (n, d_model)."""
        assert self.slices is not None
        rows = self.rows_of_slices(routing, stream)
        hidden = self.slices.hidden(rows.gather(read), rows)
        if routing.weights.requires_grad:
            gate = rows.gather_per_slot(routing.weights / routing.weights.detach())
            hidden = hidden * gate[:, None].to(hidden.dtype)
        return rows.combine(grouped_linear(hidden, self.slices.down_proj, rows))

    def step(
        self, x: Tensor, context: DecodeContext, states: MoLCacheLayer
    ) -> tuple[Tensor, Routing | None]:
        """Compute the residual, (B, d_model), after a decoding step, and the routing."""
        block, rows, routing = self.block, context.always[1], None
        x = x + block.mix_step(x, context.blocks(rows, states.always))
        read = x if block.post_norm is None else rms_norm(x, block.post_norm, block.eps)
        added = block.mlp.network_step(read, rows)
        if self.slices is not None and self.router is not None:
            weight, bias = self.router.weight, self.router.correction_bias
            routing = Routing(*route(x, weight, bias, self.router.top_k))
            chosen = self.slices.network_step(
                read, routed_decode_rows(routing.blocks, weight.shape[0])
            )
            added = added + chosen.unflatten(0, (len(x), -1)).sum(dim=1)
        if block.mlp_out_norm is not None:
            added = rms_norm(added, block.mlp_out_norm, block.eps)
        return x + added, routing


class SkippedLayer(GradientCheckpointingLayer):
    """A layer that adds nothing: a parent's layer that a conversion drops."""

    def __init__(self, config: MoLConfig, mixer: str, index: int = 0) -> None:
        super().__init__()

    def forward(
        self, x: Tensor, context: ForwardContext, states: MoLCacheLayer | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Return x, (n, d_model), and None: nothing is routed."""
        return x, None

    def step(
        self, x: Tensor, context: DecodeContext, states: MoLCacheLayer
    ) -> tuple[Tensor, Routing | None]:
        """Return x, (B, d_model), and None."""
        return x, None


Layer = DenseLayer | MoLLayer | SlicedLayer | SkippedLayer
ConvertedLayer = MoLLayer | SlicedLayer
STRUCTURES = {
    "dense": DenseLayer,
    "mixture": MoLLayer,
    "sliced": SlicedLayer,
    "skipped": SkippedLayer,
}


def new_layer(config: MoLConfig, index: int) -> Layer:
    """Make layer `index`, of the structure and with the mixer that the configuration says."""
    return STRUCTURES[config.layer_structures[index]](config, config.layer_mixers[index], index)
