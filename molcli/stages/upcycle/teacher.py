"""What one dense layer of the parent computes, as targets for the blocks that replace it."""

import torch
from torch import Tensor

from molcli.maths.partition import Part
from molcli.maths.projections import equal_say
from molcli.model.block_stack import StackedAttention
from molcli.model.context import Context
from molcli.model.layers import DenseLayer


class Teacher:
    """One parent layer on its own input.

    attention: (n, d_model), what attention adds to the residual. output: (n, d_model), the layer's
    residual output.
    """

    def __init__(self, layer: DenseLayer, x: Tensor, context: Context) -> None:
        """x: (n, d_model), the parent's residual before the layer."""
        block, rows = layer.block, context.dense_rows
        assert isinstance(block.mixer, StackedAttention)
        self.block, self.mixer = block, block.mixer
        self._attention_input = block.norm(x, block.input_norm, rows)
        self._rows, self._context = rows, context
        self.attention = block.mixer(
            self._attention_input, rows, context.rotary, context.stream, None
        )
        middle = x + self.attention
        self._mlp_input = block.norm(middle, block.post_norm, rows)
        self.output = middle + block.mlp(self._mlp_input, rows)

    def projected(self, name: str, heads: tuple[int, ...]) -> Tensor:
        """(n, heads * head_dim), what "q", "k" or "v" gives, before norms and rotary positions."""
        out = self._attention_input @ self._head_weight(name, heads).mT
        bias = getattr(self.mixer, f"{name}_bias")
        return out if bias is None else out + bias[0, self._head_rows(heads)]

    def heads(self, heads: tuple[int, ...]) -> Tensor:
        """(n, heads, head_dim), what attention heads read, before the output projection."""
        context = self._context
        out = self.mixer.heads(
            self._attention_input, self._rows, context.rotary, context.stream, None
        )
        return out[:, list(heads)]

    def neuron_inputs(self, name: str, neurons: tuple[int, ...]) -> Tensor:
        """(n, neurons), what "gate" or "up" gives."""
        return self._mlp_input @ self._neuron_weight(name, neurons).mT

    def reading_gram(self, part: Part) -> Tensor:
        """(d_model, d_model) float64, sum of W^T W over what the part's heads and neurons read
        from the unit-rms residual, attention and FFN scaled to the same energy."""
        attention = [self._head_weight("q", part.heads)]
        attention += [self._head_weight(name, part.kv_heads) for name in ("k", "v")]
        neurons = [self._neuron_weight(name, part.neurons) for name in ("gate", "up")]
        return equal_say(
            (torch.cat(attention) * self.block.input_norm).double(),
            (torch.cat(neurons) * self.block.post_norm).double(),
        )

    def _head_rows(self, heads: tuple[int, ...]) -> Tensor:
        index = torch.tensor(heads, device=self.output.device)
        within = torch.arange(self.mixer.head_dim, device=self.output.device)
        return (index[:, None] * self.mixer.head_dim + within).flatten()

    def _head_weight(self, name: str, heads: tuple[int, ...]) -> Tensor:
        weight: Tensor = getattr(self.mixer, f"{name}_proj")
        return weight[0, self._head_rows(heads)]

    def _neuron_weight(self, name: str, neurons: tuple[int, ...]) -> Tensor:
        weight: Tensor = getattr(self.block.mlp, f"{name}_proj")
        return weight[0, torch.tensor(neurons, device=self.output.device)]
