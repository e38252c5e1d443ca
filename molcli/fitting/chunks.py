"""Split packed rows into chunks of a flat token stream, and run one layer on all of them.

Input: packed rows of token ids, (rows, T). Output: `Chunks`, which cover n = rows * T tokens in
order and run a layer on a residual (n, d_model) with bounded memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molcli.data.packing import TokenRows
from molcli.families.rotary import rotary_embedding
from molcli.kernels.packed_rows import PackedRows
from molcli.model.configuration_mol import MoLConfig
from molcli.model.context import ForwardContext, rotary_of, rows_of_all
from molcli.model.layers import Layer
from molcli.model.mixers import BlockContext
from molcli.model.shapes import BlockShape, routed_shape, shared_shape
from molcli.model.tokens import TokenStream, token_stream

# Bytes for what a layer, or the fit of one, computes for the tokens of a chunk: a GPU is fastest
# with few and large products; on a CPU the rest of the fit needs room.
CHUNK_BYTES = {"cuda": 4 * 2**30, "cpu": 2**26}
# The outputs of a group's heads are kept for the whole text if they are at most this fraction of
# d_model wide. Wider ones, those of a shared block, would take as much memory as one more residual
# and are recomputed.
MAX_KEPT_HEADS = 0.4


@dataclass(frozen=True)
class Context:
    """What every layer needs besides the residual of n tokens.

    stream: documents and positions of the tokens. dense_rows: every token once, for a dense layer.
    shared_rows: every token in every shared block, for a MoL layer.
    """

    stream: TokenStream
    dense_rows: PackedRows
    shared_rows: PackedRows
    embedding: nn.Module

    @property
    def rotary(self) -> tuple[Tensor, Tensor]:
        """cos and sin, (n, rotary channels) float32. Computed on each access: for all chunks of a
        long text they would take too much memory."""
        return rotary_of(self.embedding, self.stream.position)

    def forward_context(self) -> ForwardContext:
        """Return what a layer reads besides its input."""
        return ForwardContext(self.stream, self.rotary, self.dense_rows, self.shared_rows)

    def blocks(self, rows: PackedRows) -> BlockContext:
        """Return what a stack of blocks reads when it runs on these rows."""
        return self.forward_context().blocks(rows)

    def run(self, layer: Layer, x: Tensor) -> Tensor:
        """Run one layer on the residual x (n, d_model) -> (n, d_model)."""
        out: Tensor = layer(x, self.forward_context())[0]
        return out


@dataclass(frozen=True)
class Chunk:
    """Some whole packed rows of a text. tokens: the range of the text's tokens that it covers."""

    tokens: slice
    context: Context


@dataclass(frozen=True)
class Chunks:
    """The chunks of a text, in order. No document crosses a packed row, hence none a chunk."""

    chunks: tuple[Chunk, ...]

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self.chunks)

    @torch.no_grad()
    def run(self, layer: Layer, x: Tensor) -> Tensor:
        """Run one layer on the residual x (n, d_model) -> (n, d_model), a new tensor."""
        out = torch.empty_like(x)
        for chunk in self.chunks:
            out[chunk.tokens] = chunk.context.run(layer, x[chunk.tokens])
        return out


def chunk_text(config: MoLConfig, rows: TokenRows, device: torch.device) -> Chunks:
    """Split a text into chunks of as many packed rows as fit in `CHUNK_BYTES`, at least one."""
    length = rows.input_ids.shape[1]
    rows_per_chunk = max(1, CHUNK_BYTES[device.type] // (length * bytes_per_token(config)))
    chunks = []
    for i, batch in enumerate(rows.batches(rows_per_chunk)):
        first = i * rows_per_chunk * length
        context = token_context(config, batch.document_ids, batch.position_ids, device)
        chunks.append(Chunk(slice(first, first + batch.input_ids.numel()), context))
    return Chunks(tuple(chunks))


def token_context(
    config: MoLConfig,
    document_ids: Tensor,
    position_ids: Tensor,
    device: torch.device,
    attention_mask: Tensor | None = None,
) -> Context:
    """Build the context of some packed rows.

    document_ids, position_ids: (rows, T). attention_mask: (rows, T), 0 for padding.
    """
    stream = token_stream(
        (document_ids.shape[0], document_ids.shape[1]),
        device,
        past_length=0,
        attention_mask=attention_mask,
        position_ids=position_ids.to(device),
        document_ids=document_ids.to(device),
    )
    rows = rows_of_all(stream, config.num_shared_blocks)
    return Context(stream, *rows, rotary_embedding(config).to(device))


def bytes_per_token(config: MoLConfig) -> int:
    """Return the bytes that a layer holds per token at its peak, in float32.

    Either the parent's layer with all of its neurons, or the thin blocks that see the token.
    """
    d, routed = config.hidden_size, config.num_routed_blocks
    visits = config.num_blocks_per_tok if config.restrict_attention else routed

    def numbers(shape: BlockShape) -> int:
        inner = shape.num_heads * shape.head_dim
        return 2 * d + 3 * shape.width + 3 * inner + 3 * shape.d_ff

    dense = 3 * config.intermediate_size
    shared = config.num_shared_blocks * numbers(shared_shape(config))
    return 4 * (8 * d + max(dense, shared + visits * numbers(routed_shape(config))))
