"""B independent pre-norm Transformer blocks with stacked weights, computed side by side."""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from molcli.kernels.decode_rows import DecodeRows
from molcli.kernels.grouped_linear import grouped_linear, grouped_linears
from molcli.kernels.indexed_linear import indexed_linear
from molcli.kernels.packed_rows import PackedRows
from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.mixers import MIXERS, BlockContext, StepContext
from molcli.model.norms import rms_norm


class FeedForward(nn.Module):
    """The feed-forward network of every block: gated (SwiGLU, arXiv 2002.05202) or two matrices."""

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
        """Compute the network on normalised rows: (M, width) -> (M, width)."""
        return grouped_linear(self.hidden(x, rows), self.down_proj, rows)

    def hidden(self, x: Tensor, rows: PackedRows) -> Tensor:
        """Compute the hidden activations: (M, width) -> (M, d_ff)."""
        if self.gate_proj is None:
            return self.activation(grouped_linear(x, self.up_proj, rows))
        gate, up = grouped_linears(x, (self.gate_proj, self.up_proj), rows)
        return self.activation(gate) * up

    def network_step(self, x: Tensor, rows: DecodeRows) -> Tensor:
        """Compute the network on normalised rows of one new token a sequence.

        Args:
            x: (R / d, width), a value for every d neighbouring rows.
            rows: the layout of R rows.

        Returns:
            (R, width).
        """
        weights = [w for w in (self.gate_proj, self.up_proj) if w is not None]
        hidden = indexed_linear(x, list(weights), rows, activation=self.activation_name)
        return indexed_linear(hidden, [self.down_proj], rows)

    def step(
        self,
        x: Tensor,
        mixed: Tensor,
        norm: Tensor | None,
        out_norm: Tensor | None,
        eps: float,
        context: StepContext,
    ) -> Tensor:
        """Compute mixed + out_norm(mlp(norm(x + mixed))) for one new token a sequence.

        Args:
            x: (R, width), residual rows before the mixer.
            mixed: (R, width), what the mixer adds to them.
            norm, out_norm: (B, width), weights of the RMSNorms before and behind the network; None
                without one.
            eps: of these norms.

        Returns:
            (R, width), what mixer and network add to the residual together.
        """
        weights = [w for w in (self.gate_proj, self.up_proj) if w is not None]
        hidden = indexed_linear(
            x,
            list(weights),
            context.rows,
            delta=mixed,
            norm=norm,
            eps=eps,
            activation=self.activation_name,
        )
        if out_norm is None:
            return indexed_linear(hidden, [self.down_proj], context.rows, residual=mixed)
        out = indexed_linear(hidden, [self.down_proj], context.rows)
        return mixed + rms_norm(out, out_norm[context.rows.blocks], eps)


class BlockStack(nn.Module):
    """B blocks: each adds mixer(norm(x)) to its rows, then mlp(norm(.)).

    With output norms, what mixer and network add passes an RMSNorm of its own. Norms that a block
    does not have are None.
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
        self.mixer = MIXERS[spec.mixer](spec, config)
        self.mlp = FeedForward(spec, config)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """Compute what every block adds to its rows: (M, width) -> (M, width)."""
        mixed = self.mix(x, context)
        return mixed + self.feed(x + mixed, context.rows)

    def mix(self, x: Tensor, context: BlockContext) -> Tensor:
        """Compute what the mixers add to x: (M, width) -> (M, width)."""
        mixed = self.mixer(self.norm(x, self.input_norm, context.rows), context)
        return self.norm(mixed, self.mixer_out_norm, context.rows)

    def feed(self, x: Tensor, rows: PackedRows) -> Tensor:
        """Compute what the feed-forward networks add to x, which includes the mixers' part."""
        return self.norm(
            self.mlp(self.norm(x, self.post_norm, rows), rows), self.mlp_out_norm, rows
        )

    def norm(self, x: Tensor, weight: Tensor | None, rows: PackedRows) -> Tensor:
        """Apply each block's own RMSNorm, if there is one. x: (M, width), weight: (B, width)."""
        return x if weight is None else rms_norm(x, rows.gather_per_block(weight), self.eps)

    def step(self, x: Tensor, context: StepContext) -> Tensor:
        """Compute what the blocks add to one new token a sequence: (R, width) -> (R, width)."""
        norms = self.post_norm, self.mlp_out_norm
        return self.mlp.step(x, self.mix_step(x, context), *norms, self.eps, context)

    def mix_step(self, x: Tensor, context: StepContext) -> Tensor:
        """Compute what the mixers add to one new token a sequence: (R, width) -> (R, width)."""
        mixed = self.mixer.step(x, self.input_norm, context)
        if self.mixer_out_norm is None:
            return mixed
        return rms_norm(mixed, self.mixer_out_norm[context.rows.blocks], self.eps)
