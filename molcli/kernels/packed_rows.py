"""PackedRows: the tokens of each block, gathered side by side.

A layer with B blocks runs each block on its own tokens. Instead of B small tensors, every
operation works on one tensor of M rows, sorted by (block, document, time). A *segment* is the
run of rows of one block and one document: attention, convolution and recurrent state live inside
it. Shared and dense blocks are the case in which a block's tokens are all tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class PackedRows:
    """Which token each row holds, and where blocks and segments begin.

    tokens: (M,) int64, index into the flat token stream.
    slots: (M,) int64, which of its token's `num_slots` rows this is.
    blocks: (M,) int64, ascending.
    offsets: (B,) int32, the end of each block's rows, as grouped matmuls take it.
    segments: (M,) int64, block * num_documents + document.
    cu_seqlens: (B * num_documents + 1,) int32, where segments begin; empty ones are legal.
    of_token: (n, num_slots) int64, the rows of each token.
    max_seqlen: no segment is longer. even: whether all are as long.
    """

    tokens: Tensor
    slots: Tensor
    blocks: Tensor
    offsets: Tensor
    segments: Tensor
    cu_seqlens: Tensor
    of_token: Tensor
    max_seqlen: int
    even: bool = False

    @property
    def num_slots(self) -> int:
        return self.of_token.shape[1]

    @property
    def num_blocks(self) -> int:
        return self.offsets.shape[0]

    @property
    def index_in_segment(self) -> Tensor:
        """(M,) int64, how many rows of its own segment stand before each row."""
        row = torch.arange(self.tokens.shape[0], device=self.tokens.device)
        return row - self.cu_seqlens[self.segments]

    def gather(self, x: Tensor) -> Tensor:
        """x: (n, ...) a value per token -> (M, ...) a value per row."""
        if self.num_blocks == 1 and self.num_slots == 1:
            return x
        return _Gather.apply(x, self)

    def gather_slots(self, x: Tensor) -> Tensor:
        """x: (n, num_slots) a value per token and slot -> (M,) a value per row."""
        return _GatherSlots.apply(x, self)

    def combine(self, x: Tensor) -> Tensor:
        """x: (M, D) a value per row -> (n, D), summed over each token's rows.

        A gather and a sum: no atomics, hence the same bits in every run.
        """
        return _Combine.apply(x, self)

    def per_row(self, values: Tensor) -> Tensor:
        """values: (B, ...) one per block -> (M, ...) one per row, or (1, ...) where B is 1."""
        return values if values.shape[0] == 1 else _PerRow.apply(values, self)

    def of_blocks(self, first: int, count: int) -> "PackedRows":
        """The rows of `count` neighbouring blocks, as a layout of their own.

        A token may have any number of rows there, so `of_token` is empty: use `scatter`.
        """
        documents = (self.cu_seqlens.shape[0] - 1) // self.num_blocks
        cu = self.cu_seqlens[first * documents : (first + count) * documents + 1]
        begin, end = int(cu[0]), int(cu[-1])
        return PackedRows(
            tokens=self.tokens[begin:end],
            slots=self.slots[begin:end],
            blocks=self.blocks[begin:end] - first,
            offsets=self.offsets[first : first + count] - begin,
            segments=self.segments[begin:end] - first * documents,
            cu_seqlens=cu - begin,
            of_token=self.of_token[:, :0],
            max_seqlen=self.max_seqlen,
        )

    def of_first_tokens(self, count: int) -> tuple["PackedRows", Tensor]:
        """The rows of the stream's first `count` tokens, and which of these rows they are (M', ).

        For work that neither gathers nor combines tokens: `of_token` is empty.
        """
        kept = (self.tokens < count).nonzero()[:, 0]
        segments = self.segments[kept].contiguous()
        starts = torch.arange(self.cu_seqlens.shape[0], device=segments.device)
        cu = torch.searchsorted(segments, starts).int()
        documents = (self.cu_seqlens.shape[0] - 1) // self.num_blocks
        first = PackedRows(
            tokens=self.tokens[kept],
            slots=self.slots[kept],
            blocks=self.blocks[kept],
            offsets=cu[documents::documents].clone(),
            segments=segments,
            cu_seqlens=cu,
            of_token=self.of_token[:, :0],
            max_seqlen=self.max_seqlen,
        )
        return first, kept

    def scatter(self, x: Tensor, num_tokens: int) -> Tensor:
        """x: (M, D) -> (num_tokens, D), summed over rows; for layouts without `of_token`."""
        return x.new_zeros(num_tokens, x.shape[1]).index_add(0, self.tokens, x)


# Gathers whose indices repeat have slow backward passes: autograd sorts the indices and adds row by
# row. Here each one's adjoint is another gather, or a product with a one-hot matrix.


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: PackedRows) -> Tensor:
        ctx.rows = rows
        return x[rows.tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rows.of_token].sum(dim=1), None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: PackedRows) -> Tensor:
        ctx.rows = rows
        return x[rows.of_token].sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rows.tokens], None


class _GatherSlots(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: PackedRows) -> Tensor:
        ctx.rows = rows
        return x[rows.tokens, rows.slots]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rows.of_token], None


class _PerRow(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: PackedRows) -> Tensor:
        ctx.rows = rows
        return values[rows.blocks]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        blocks = torch.arange(ctx.rows.num_blocks, device=grad.device)
        one_hot = (ctx.rows.blocks == blocks[:, None]).to(grad.dtype)
        total = one_hot @ grad.flatten(1)
        return total.unflatten(1, grad.shape[1:]) if grad.ndim > 1 else total[:, 0], None


def all_rows(document: Tensor, num_documents: int, num_blocks: int, max_seqlen: int) -> PackedRows:
    """Every block sees every token. document: (n,) int64, ascending."""
    n = document.shape[0]
    token = torch.arange(n, device=document.device)
    block = torch.arange(num_blocks, device=document.device)
    tokens, blocks = token.repeat(num_blocks), block.repeat_interleave(n)
    return _rows(
        tokens=tokens,
        slots=blocks,
        blocks=blocks,
        of_token=token[:, None] + n * block,
        document=document,
        sizes=(num_blocks, num_documents),
        max_seqlen=max_seqlen,
        even=num_documents * max_seqlen == n,
    )


def routed_rows(
    chosen: Tensor, document: Tensor, num_documents: int, num_blocks: int, max_seqlen: int
) -> PackedRows:
    """Each block sees the tokens that chose it, in their order.

    chosen: (n, k) int64, the distinct blocks of each token. document: (n,) int64, ascending.
    The sort is stable, so time order survives inside a segment.
    """
    n, k = chosen.shape
    # A radix sort passes over the keys once for each of their bytes.
    small = torch.uint8 if num_blocks <= 2**8 else torch.int64
    keys, order = torch.sort(chosen.flatten().to(small), stable=True)
    blocks = keys.long()
    of_token = torch.empty_like(order)
    of_token[order] = torch.arange(n * k, device=chosen.device)
    return _rows(
        tokens=order // k,
        slots=order % k,
        blocks=blocks,
        of_token=of_token.view(n, k),
        document=document,
        sizes=(num_blocks, num_documents),
        max_seqlen=max_seqlen,
    )


def _rows(
    *,
    tokens: Tensor,
    slots: Tensor,
    blocks: Tensor,
    of_token: Tensor,
    document: Tensor,
    sizes: tuple[int, int],
    max_seqlen: int,
    even: bool = False,
) -> PackedRows:
    num_blocks, num_documents = sizes
    segments = blocks * num_documents + document[tokens]
    starts = torch.arange(num_blocks * num_documents + 1, device=tokens.device)
    cu_seqlens = torch.searchsorted(segments, starts).int()
    return PackedRows(
        tokens=tokens,
        slots=slots,
        blocks=blocks,
        # Not contiguous(): one element keeps its stride then, and compiled code guards on that.
        offsets=cu_seqlens[num_documents::num_documents].clone(
            memory_format=torch.contiguous_format
        ),
        segments=segments,
        cu_seqlens=cu_seqlens,
        of_token=of_token,
        max_seqlen=max_seqlen,
        even=even,
    )


def chunk_table(cu_seqlens: Tensor, num_rows: int, size: int) -> Tensor:
    """Rows in chunks of at most `size` that never cross segments.

    cu_seqlens: (segments + 1,) int64 -> (num_rows // size + segments, 2) int64, the segment of
    every chunk and its place there. There are never more; lines to spare name places past the end
    of the last segment that has rows. Knowing the right number would mean waiting for the device.
    """
    ends = ((cu_seqlens.diff() + size - 1) // size).cumsum(0)
    line = torch.arange(num_rows // size + ends.shape[0], device=ends.device)
    segment = torch.searchsorted(ends, torch.minimum(line, ends[-1] - 1), right=True)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    return torch.stack([segment, line - begins[segment]], dim=1)


def pad_segments(x: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """x: (M, ...) rows -> (segments, length, ...), zeros after each segment's end."""
    segment, index = _row_places(cu_seqlens, x.shape[0])
    padded = x.new_zeros(cu_seqlens.shape[0] - 1, length, *x.shape[1:])
    return padded.index_put((segment, index), x)


def unpad_segments(x: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """x: (segments, length, ...) -> (M, ...) rows; the inverse of `pad_segments`."""
    return x[_row_places(cu_seqlens, num_rows)]


def longest_segment(cu_seqlens: Tensor) -> int:
    """Rows in the longest segment, at least 1. Waits for the device."""
    return max(1, int(cu_seqlens.diff().max()))


def _row_places(cu_seqlens: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    row = torch.arange(num_rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    segment = torch.searchsorted(cu_seqlens, row, right=True) - 1
    return segment, row - cu_seqlens[segment]
