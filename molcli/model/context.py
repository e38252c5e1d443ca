"""Packed rows as a flat token stream, for work that goes through a model layer by layer."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from molcli.kernels.rows import Rows, all_rows
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import DenseLayer, Layer
from molcli.model.rotary import rotary_embedding
from molcli.model.tokens import TokenStream, token_stream


@dataclass(frozen=True)
class Context:
    """What every layer needs to know about n tokens.

    dense_rows, shared_rows: all tokens once, and in every shared block.
    """

    stream: TokenStream
    dense_rows: Rows
    shared_rows: Rows
    embedding: Phi3RotaryEmbedding

    @property
    def rotary(self) -> tuple[Tensor, Tensor]:
        """cos and sin, (n, channels that turn) float32; made anew, since a long text has many."""
        position = self.stream.position
        cos, sin = self.embedding(torch.empty(0, device=position.device), position[None])
        return cos[0], sin[0]

    def run(self, layer: Layer, x: Tensor) -> Tensor:
        """One layer on the residual x (n, d_model) -> (n, d_model)."""
        rows = self.dense_rows if isinstance(layer, DenseLayer) else self.shared_rows
        out: Tensor = layer(x, rows, self.rotary, self.stream)[0]
        return out


def token_context(
    config: MoLConfig,
    document_ids: Tensor,
    position_ids: Tensor,
    device: torch.device,
    attention_mask: Tensor | None = None,
) -> Context:
    """document_ids, position_ids: (rows, T) of packed rows; attention_mask: 0 where padded."""
    stream = token_stream(
        (document_ids.shape[0], document_ids.shape[1]),
        device,
        past_length=0,
        attention_mask=attention_mask,
        position_ids=position_ids.to(device),
        document_ids=document_ids.to(device),
    )
    sizes = stream.document, stream.num_documents
    return Context(
        stream=stream,
        dense_rows=all_rows(*sizes, 1, stream.length),
        shared_rows=all_rows(*sizes, max(1, config.num_shared_blocks), stream.length),
        embedding=rotary_embedding(config).to(device),
    )
