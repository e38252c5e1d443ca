"""What a layer reads besides its input: of a forward pass, and of one decoding step."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from molcli.kernels.decode_rows import DecodeRows
from molcli.kernels.packed_rows import PackedRows, all_rows
from molcli.model.mixers import BlockContext, CacheLength, State, StepContext
from molcli.model.schedule import Schedule
from molcli.model.tokens import TokenStream


@dataclass(frozen=True)
class ForwardContext:
    """What every layer reads in a forward pass over n tokens.

    Attributes:
        stream: the tokens.
        rotary: cos and sin of their positions, each (n, channels that rotate).
        dense_rows: all tokens, once.
        shared_rows: all tokens in every shared block.
        schedule: how the parts of a layer run.
    """

    stream: TokenStream
    rotary: tuple[Tensor, Tensor]
    dense_rows: PackedRows
    shared_rows: PackedRows
    schedule: Schedule = field(default_factory=Schedule)

    def blocks(self, rows: PackedRows, state: State | None = None) -> BlockContext:
        """Return what a stack of blocks reads when it runs on these rows."""
        return BlockContext(rows, self.rotary, self.stream, state)


def rows_of_all(stream: TokenStream, num_shared_blocks: int) -> tuple[PackedRows, PackedRows]:
    """Lay out all tokens of a stream.

    Returns:
        The tokens once, and in every shared block; the same rows for up to one shared block.
    """
    sizes = stream.document, stream.num_documents
    once = all_rows(*sizes, 1, stream.length)
    if num_shared_blocks <= 1:
        return once, once
    return once, all_rows(*sizes, num_shared_blocks, stream.length)


@dataclass(frozen=True)
class DecodeContext:
    """What every layer reads in a decoding step of one token a sequence.

    Attributes:
        rotary: cos and sin, each (B, channels that rotate).
        active: (B,) int32, 0 where the new token is padding and must not change a state.
        length: how full the static cache is.
        always: rows of every token in all of so many blocks, by their number.
        schedule: how the parts of a layer run.
    """

    rotary: tuple[Tensor, Tensor]
    active: Tensor
    length: CacheLength
    always: dict[int, DecodeRows]
    schedule: Schedule

    def blocks(self, rows: DecodeRows, state: State) -> StepContext:
        """Return what a stack of blocks reads when it runs on these rows."""
        return StepContext(rows, self.rotary, self.active, self.length, state)


def rotary_of(embedding: Any, position: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cos and sin, each (n, channels that rotate) float32, of positions (n,)."""
    cos, sin = embedding(torch.empty(0, device=position.device), position[None])
    return cos[0], sin[0]
