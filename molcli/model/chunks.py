"""A long text in chunks: no layer ever computes on all of its tokens at once."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.io.packing import TokenRows
from molcli.maths.architecture import BlockShape, routed_shape, shared_shape
from molcli.model.configuration_mol import MoLConfig
from molcli.model.context import Context, token_context
from molcli.model.layers import Layer

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
