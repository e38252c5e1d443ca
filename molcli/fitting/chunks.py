"""Packed rows as a flat token stream, for work that goes through a model layer by layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molcli.data.packing import TokenRows
from molcli.kernels.packed_rows import PackedRows
from molcli.model.configuration_mol import MoLConfig
from molcli.model.context import ForwardContext, rotary_of, rows_of_all
from molcli.model.layers import Layer
from molcli.model.mixers import BlockContext
from molcli.model.rotary import rotary_embedding
from molcli.model.shapes import BlockShape, routed_shape, shared_shape
from molcli.model.tokens import TokenStream, token_stream


@dataclass(frozen=True)
class Context:
    """What every layer needs to know about n tokens.

    dense_rows, shared_rows: all tokens once, and in every shared block.
    """

    stream: TokenStream
    dense_rows: PackedRows
    shared_rows: PackedRows
    embedding: nn.Module

    @property
    def rotary(self) -> tuple[Tensor, Tensor]:
        """cos and sin, (n, channels that turn) float32; made anew, since a long text has many."""
        return rotary_of(self.embedding, self.stream.position)

    def forward_context(self) -> ForwardContext:
        """Return what a layer reads besides its input."""
        return ForwardContext(self.stream, self.rotary, self.dense_rows, self.shared_rows)

    def blocks(self, rows: PackedRows) -> BlockContext:
        """Return what a stack of blocks reads when it runs on these rows."""
        return BlockContext(rows, self.rotary, self.stream)

    def run(self, layer: Layer, x: Tensor) -> Tensor:
        """One layer on the residual x (n, d_model) -> (n, d_model)."""
        out: Tensor = layer(x, self.forward_context())[0]
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
    return Context(
        stream=stream,
        dense_rows=rows_of_all(stream, 1),
        shared_rows=rows_of_all(stream, config.num_shared_blocks),
        embedding=rotary_embedding(config).to(device),
    )


# Bytes for what a layer, or the fit of one, computes of a chunk's tokens: a GPU wants few and large
# products, a CPU leaves room for the rest.
CHUNK_BYTES = {"cuda": 4 * 2**30, "cpu": 2**26}
# A family's heads are held for the whole text up to this share of a residual's width: wider ones,
# those of a shared block, would take as much as one more residual, and are computed anew.
MOST_HEADS_HELD = 0.4


@dataclass(frozen=True)
class Chunk:
    """Some whole packed rows of a text. tokens: which of its tokens these are."""

    tokens: slice
    context: Context


@dataclass(frozen=True)
class Chunks:
    """A text's chunks, in order. Documents do not cross packed rows, hence no chunk either."""

    chunks: tuple[Chunk, ...]

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self.chunks)

    @torch.no_grad()
    def run(self, layer: Layer, x: Tensor) -> Tensor:
        """One layer on the residual x (n, d_model) -> (n, d_model), a tensor of its own."""
        out = torch.empty_like(x)
        for chunk in self.chunks:
            out[chunk.tokens] = chunk.context.run(layer, x[chunk.tokens])
        return out


def chunk_text(config: MoLConfig, rows: TokenRows, device: torch.device) -> Chunks:
    """As many packed rows a chunk as `CHUNK_BYTES` allow, at least one."""
    length = rows.input_ids.shape[1]
    at_once = max(1, CHUNK_BYTES[device.type] // (length * bytes_a_token(config)))
    chunks = []
    for i, batch in enumerate(rows.batches(at_once)):
        first = i * at_once * length
        context = token_context(config, batch.document_ids, batch.position_ids, device)
        chunks.append(Chunk(slice(first, first + batch.input_ids.numel()), context))
    return Chunks(tuple(chunks))


def bytes_a_token(config: MoLConfig) -> int:
    """What a layer holds of a token at its peak, in float32: the parent's layer with all of its
    neurons, or the thin blocks that see the token."""
    d, routed = config.hidden_size, config.num_routed_blocks
    visits = config.num_blocks_per_tok if config.restrict_attention else routed

    def block(shape: BlockShape) -> int:
        inner = shape.num_heads * config.head_dim
        return 2 * d + 3 * shape.width + 3 * inner + 3 * shape.d_ff

    dense = 3 * config.intermediate_size
    shared = config.num_shared_blocks * block(shared_shape(config))
    return 4 * (8 * d + max(dense, shared + visits * block(routed_shape(config))))
