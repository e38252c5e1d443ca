"""What one dense layer of the parent computes, as targets for the blocks that replace it."""

import torch
from torch import Tensor

from molcli.fitting.chunks import Chunk, Chunks
from molcli.fitting.partition import Part
from molcli.fitting.projection import head_rows
from molcli.model.layers import DenseLayer
from molcli.model.mixers import Attention


class Teacher:
    """One parent layer, which works in place on the residual of a whole text.

    x: (n, d_model), the residual before the layer; after `attend`, with what attention adds; after
    `feed`, past the layer. attention: (n, d_model), what attention adds; until `attend`. All else
    is computed when asked for, of a chunk.
    """

    @torch.no_grad()
    def __init__(self, layer: DenseLayer, x: Tensor, chunks: Chunks) -> None:
        assert isinstance(layer.block.mixer, Attention)
        self.block, self.mixer, self.chunks = layer.block, layer.block.mixer, chunks
        self.x, self.attention = x, torch.empty_like(x)
        for chunk in chunks:
            context, before = chunk.context, x[chunk.tokens]
            mixed = self.block.mix(before, context.blocks(context.dense_rows))
            self.attention[chunk.tokens] = mixed

    @torch.no_grad()
    def attend(self) -> None:
        """Adds attention's part, and forgets it."""
        self.x += self.attention
        del self.attention

    @torch.no_grad()
    def feed(self) -> None:
        """Adds the FFN's part."""
        for chunk in self.chunks:
            self.x[chunk.tokens] += self.fed(chunk)

    def fed(self, chunk: Chunk) -> Tensor:
        """(tokens, d_model), what the FFN adds; between `attend` and `feed`."""
        return self.block.feed(self.x[chunk.tokens], chunk.context.dense_rows)

    def attention_input(self, chunk: Chunk) -> Tensor:
        """(tokens, d_model), and a column of ones where q, k and v have biases; before `attend`."""
        rows, x = chunk.context.dense_rows, self.x[chunk.tokens]
        read = self.block.norm(x, self.block.input_norm, rows)
        return read if self.mixer.q_bias is None else torch.cat([read, read[:, :1] * 0 + 1], dim=1)

    def projection(self, name: str, heads: tuple[int, ...]) -> Tensor:
        """(heads * head_dim, width of `attention_input`), "q", "k" or "v" before norms and rotary
        positions; its last column is the bias, where there is one."""
        index = head_rows(heads, self.mixer.head_dim, self.x.device)
        weight: Tensor = getattr(self.mixer, f"{name}_proj")
        bias: Tensor | None = getattr(self.mixer, f"{name}_bias")
        chosen = weight[0, index]
        return chosen if bias is None else torch.cat([chosen, bias[0, index, None]], dim=1)

    @torch.no_grad()
    def head_norm(self, name: str, heads: tuple[int, ...]) -> Tensor:
        """The weight of the norm of these heads, "q" or "k"; before `attend`.

        A norm over all heads becomes one over these heads alone, with their weights scaled by how
        large they are among all: their root mean square relative to that of all, on average.

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
            sizes.append((energy[:, own].mean(-1) / energy.mean(-1)).sqrt())
        return weight[own] * torch.cat(sizes).mean()

    def heads(self, chunk: Chunk, heads: tuple[int, ...]) -> Tensor:
        """(tokens, heads, head_dim), what the heads read, before the output projection; before
        `attend`."""
        context = chunk.context
        rows, x = context.dense_rows, self.x[chunk.tokens]
        read = self.block.norm(x, self.block.input_norm, rows)
        out = self.mixer.heads(read, context.blocks(rows))
        return out[:, list(heads)]

    def mlp_input(self, chunk: Chunk) -> Tensor:
        """(tokens, d_model), what gate and up read; between `attend` and `feed`."""
        x, block = self.x[chunk.tokens], self.block
        return block.norm(x, block.post_norm, chunk.context.dense_rows)

    def neurons(self, part: Part) -> Tensor:
        """(2 * neurons, d_model), gate and up of the part's neurons."""
        index, mlp = torch.tensor(part.neurons, device=self.x.device), self.block.mlp
        assert mlp.gate_proj is not None
        return torch.cat([mlp.gate_proj[0, index], mlp.up_proj[0, index]])
