"""Compute what one dense layer of the parent reads and adds: the targets of a fit.

Input: the layer and the residual (n, d_model) before it. Outputs, a chunk of tokens at a time:
inputs of attention and FFN (tokens, d_model), heads' outputs (tokens, heads, head_dim), what the
FFN adds (tokens, d_model); and the layer's weights for selected heads and neurons.
"""

import torch
from torch import Tensor

from molcli.fitting.chunks import Chunk, Chunks
from molcli.fitting.partition import BlockPart
from molcli.fitting.projection import head_rows
from molcli.model.layers import DenseLayer
from molcli.model.mixers import Attention


class LayerTargets:
    """One parent layer, which moves the residual of a whole text past itself in place.

    First the methods of attention are used, then `add_attention`, then those of the FFN, then
    `add_ffn`. Everything but x and attention_output is recomputed on each call, for one chunk.

    Attributes:
        x: (n, d_model), the residual: before the layer, after attention, after the layer.
        attention_output: (n, d_model), what attention adds; deleted by `add_attention`.
    """

    @torch.no_grad()
    def __init__(self, layer: DenseLayer, x: Tensor, chunks: Chunks) -> None:
        assert isinstance(layer.block.mixer, Attention)
        self.block, self.mixer, self.chunks = layer.block, layer.block.mixer, chunks
        self.x, self.attention_output = x, torch.empty_like(x)
        for chunk in chunks:
            context, before = chunk.context, x[chunk.tokens]
            mixed = self.block.mix(before, context.blocks(context.dense_rows))
            self.attention_output[chunk.tokens] = mixed

    def attention_input(self, chunk: Chunk) -> Tensor:
        """Return what q, k and v read, (tokens, d_model); with a column of ones if they have
        biases. Before `add_attention`."""
        rows, x = chunk.context.dense_rows, self.x[chunk.tokens]
        read = self.block.norm(x, self.block.input_norm, rows)
        return read if self.mixer.q_bias is None else torch.cat([read, read[:, :1] * 0 + 1], dim=1)

    def projection(self, name: str, heads: tuple[int, ...]) -> Tensor:
        """Return the weights of some heads, before their norms and rotary positions.

        name: "q", "k" or "v". Returns (heads * head_dim, width of `attention_input`); the last
        column is the bias, where there is one.
        """
        index = head_rows(heads, self.mixer.head_dim, self.x.device)
        weight: Tensor = getattr(self.mixer, f"{name}_proj")
        bias: Tensor | None = getattr(self.mixer, f"{name}_bias")
        chosen = weight[0, index]
        return chosen if bias is None else torch.cat([chosen, bias[0, index, None]], dim=1)

    @torch.no_grad()
    def head_norm(self, name: str, heads: tuple[int, ...]) -> Tensor:
        """Return the weight of the norm of some heads, "q" or "k". Before `add_attention`.

        A norm over all heads becomes one over these heads only, with their weights scaled by the
        mean ratio of their root mean square to that of all heads.

        Returns:
            (head_dim,), or (heads * head_dim,) where the norm is over all heads.
        """
        weight: Tensor = getattr(self.mixer, f"{name}_norm")[0]
        if not self.mixer.qk_norm_full_width:
            return weight
        own = head_rows(heads, self.mixer.head_dim, weight.device)
        every = self.projection(name, tuple(range(len(weight) // self.mixer.head_dim)))
        sizes = []
        for chunk in self.chunks:
            energy = (self.attention_input(chunk) @ every.mT).square()
            energy = energy[energy.any(dim=-1)]  # a token whose embedding is zero has no ratio
            sizes.append((energy[:, own].mean(-1) / energy.mean(-1)).sqrt())
        ratios = torch.cat(sizes)
        return weight[own] * (ratios.mean() if len(ratios) else 1.0)

    def head_outputs(self, chunk: Chunk, heads: tuple[int, ...]) -> Tensor:
        """Return the outputs of some heads before o_proj, (tokens, heads, head_dim). Before
        `add_attention`."""
        rows, x = chunk.context.dense_rows, self.x[chunk.tokens]
        read = self.block.norm(x, self.block.input_norm, rows)
        out = self.mixer.heads(read, chunk.context.blocks(rows))
        return out[:, list(heads)]

    @torch.no_grad()
    def add_attention(self) -> None:
        """Move the residual past attention."""
        self.x += self.attention_output
        del self.attention_output

    def ffn_input(self, chunk: Chunk) -> Tensor:
        """Return what gate and up read, (tokens, d_model). After `add_attention`."""
        x, block = self.x[chunk.tokens], self.block
        return block.norm(x, block.post_norm, chunk.context.dense_rows)

    def ffn_output(self, chunk: Chunk) -> Tensor:
        """Return what the FFN adds, (tokens, d_model). After `add_attention`."""
        return self.block.feed(self.x[chunk.tokens], chunk.context.dense_rows)

    def gate_and_up(self, part: BlockPart) -> Tensor:
        """Return gate_proj and up_proj of the part's neurons, (2 * neurons, d_model)."""
        index, mlp = torch.tensor(part.neurons, device=self.x.device), self.block.mlp
        assert mlp.gate_proj is not None
        return torch.cat([mlp.gate_proj[0, index], mlp.up_proj[0, index]])

    @torch.no_grad()
    def add_ffn(self) -> None:
        """Move the residual past the FFN, and so past the layer."""
        for chunk in self.chunks:
            self.x[chunk.tokens] += self.ffn_output(chunk)
