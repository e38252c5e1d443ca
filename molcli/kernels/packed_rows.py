"""PackedRows: the tokens of each block, gathered into one tensor.

A layer with B blocks runs each block on its own tokens. Instead of B small tensors, every operation
works on one tensor of M rows, sorted by (block, document, time). A *segment* is the run of rows of
one block and one document: attention, convolution and recurrent state stay inside a segment.

Three functions make a layout: `all_rows` (every block runs on every token: shared and dense
blocks), `routed_rows` (every token visits k of the blocks) and `selected_rows` (one block runs on
some of the tokens).
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

    A token has at most one row in each of `num_slots` slots: slot s of a routed token is its s-th
    block. A layout is complete if every token has a row in every slot. Where it is not, a token may
    have any number of rows from 0 to `num_slots`.

    Attributes:
        tokens: (M,) int64, each row's index into the flat token stream.
        slots: (M,) int64, each row's slot.
        blocks: (M,) int64, each row's block; ascending.
        offsets: (B,) int32, the end of each block's rows, as grouped matmuls take it.
        segments: (M,) int64, block * num_documents + document.
        cu_seqlens: (B * num_documents + 1,) int32, bounds of the segments. They may be empty.
        rows_of_token: (n, num_slots) int64, each token's rows; -1 in a slot without a row.
        max_seqlen: upper bound of the segments' lengths.
        equal_lengths: whether all segments have `max_seqlen` rows.
        complete: whether every token has a row in every slot, so that `rows_of_token` has no -1.
    """

    tokens: Tensor
    slots: Tensor
    blocks: Tensor
    offsets: Tensor
    segments: Tensor
    cu_seqlens: Tensor
    rows_of_token: Tensor
    max_seqlen: int
    equal_lengths: bool = False
    complete: bool = True

    @property
    def num_slots(self) -> int:
        """Most rows that a token may have."""
        return self.rows_of_token.shape[1]

    @property
    def num_blocks(self) -> int:
        """Number of blocks B."""
        return self.offsets.shape[0]

    @property
    def index_in_segment(self) -> Tensor:
        """(M,) int64, how many rows of its own segment precede each row."""
        row = torch.arange(self.tokens.shape[0], device=self.tokens.device)
        return row - self.cu_seqlens[self.segments]

    def gather(self, x: Tensor) -> Tensor:
        """Copy each token's value to its rows.

        Args:
            x: (n, ...), a value per token.

        Returns:
            (M, ...), a value per row.
        """
        if self.num_blocks == 1 and self.num_slots == 1 and self.complete:
            return x
        return _Gather.apply(x, self)

    def gather_per_slot(self, x: Tensor) -> Tensor:
        """Copy the value of each token and slot to its row.

        Args:
            x: (n, num_slots), a value per token and slot.

        Returns:
            (M,), a value per row.
        """
        return _GatherPerSlot.apply(x, self)

    def gather_per_block(self, x: Tensor) -> Tensor:
        """Copy each block's value to its rows.

        Args:
            x: (B, ...), a value per block.

        Returns:
            (M, ...), a value per row; `x` itself, which broadcasts, if B is 1.
        """
        return x if x.shape[0] == 1 else _GatherPerBlock.apply(x, self)

    def combine(self, x: Tensor) -> Tensor:
        """Sum over each token's rows.

        A gather and a sum without atomics, hence the same bits in every run.

        Args:
            x: (M, D), a value per row.

        Returns:
            (n, D), a value per token; zeros for a token without rows.
        """
        return _Combine.apply(x, self)

    def block_range(self, first: int, count: int) -> "PackedRows":
        """Select the rows of neighbouring blocks. Synchronises with the host.

        Args:
            first: the first block.
            count: number of blocks.

        Returns:
            A layout of `count` blocks over the same tokens, not complete.
        """
        documents = (self.cu_seqlens.shape[0] - 1) // self.num_blocks
        cu = self.cu_seqlens[first * documents : (first + count) * documents + 1]
        begin, end = int(cu[0]), int(cu[-1])
        inside = (self.rows_of_token >= begin) & (self.rows_of_token < end)
        return PackedRows(
            tokens=self.tokens[begin:end],
            slots=self.slots[begin:end],
            blocks=self.blocks[begin:end] - first,
            offsets=self.offsets[first : first + count] - begin,
            segments=self.segments[begin:end] - first * documents,
            cu_seqlens=cu - begin,
            rows_of_token=torch.where(inside, self.rows_of_token - begin, -1),
            max_seqlen=self.max_seqlen,
            complete=False,
        )

    def first_tokens(self, count: int) -> tuple["PackedRows", Tensor]:
        """Select the rows of the stream's first tokens. Synchronises with the host.

        Args:
            count: number of tokens.

        Returns:
            A layout of M' rows over these tokens, and (M',) int64, their indices among the M rows.
        """
        kept = (self.tokens < count).nonzero()[:, 0]
        segments = self.segments[kept].contiguous()
        starts = torch.arange(self.cu_seqlens.shape[0], device=segments.device)
        cu = torch.searchsorted(segments, starts).int()
        documents = (self.cu_seqlens.shape[0] - 1) // self.num_blocks
        # One more entry, which is -1 and is what a row of -1 reads.
        new_row = self.tokens.new_full((self.tokens.shape[0] + 1,), -1)
        new_row[kept] = torch.arange(kept.shape[0], device=kept.device)
        rows = PackedRows(
            tokens=self.tokens[kept],
            slots=self.slots[kept],
            blocks=self.blocks[kept],
            offsets=cu[documents::documents].clone(),
            segments=segments,
            cu_seqlens=cu,
            rows_of_token=new_row[self.rows_of_token[:count]],
            max_seqlen=self.max_seqlen,
            complete=self.complete,
        )
        return rows, kept


def all_rows(document: Tensor, num_documents: int, num_blocks: int, max_seqlen: int) -> PackedRows:
    """Lay out every token in every block.

    Args:
        document: (n,) int64, each token's document; ascending.
        num_documents: number of documents.
        num_blocks: number of blocks B.
        max_seqlen: upper bound of the documents' lengths, in tokens.

    Returns:
        A complete layout of n * B rows. A token's slot in a block is the block's number.
    """
    n = document.shape[0]
    token = torch.arange(n, device=document.device)
    block = torch.arange(num_blocks, device=document.device)
    tokens, blocks = token.repeat(num_blocks), block.repeat_interleave(n)
    return _pack(
        tokens=tokens,
        slots=blocks,
        blocks=blocks,
        rows_of_token=token[:, None] + n * block,
        document=document,
        sizes=(num_blocks, num_documents),
        max_seqlen=max_seqlen,
        equal_lengths=num_documents * max_seqlen == n,
    )


def routed_rows(
    routed: Tensor, document: Tensor, num_documents: int, num_blocks: int, max_seqlen: int
) -> PackedRows:
    """Lay out every token in the blocks that it is routed to.

    The sort is stable, so tokens keep their order inside a segment.

    Args:
        routed: (n, k) int64, the distinct blocks of each token.
        document: (n,) int64, each token's document; ascending.
        num_documents: number of documents.
        num_blocks: number of blocks B.
        max_seqlen: upper bound of the documents' lengths, in tokens.

    Returns:
        A complete layout of n * k rows.
    """
    n, k = routed.shape
    # A radix sort passes over the keys once for each of their bytes.
    small = torch.uint8 if num_blocks <= 2**8 else torch.int64
    keys, order = torch.sort(routed.flatten().to(small), stable=True)
    blocks = keys.long()
    rows_of_token = torch.empty_like(order)
    rows_of_token[order] = torch.arange(n * k, device=routed.device)
    return _pack(
        tokens=order // k,
        slots=order % k,
        blocks=blocks,
        rows_of_token=rows_of_token.view(n, k),
        document=document,
        sizes=(num_blocks, num_documents),
        max_seqlen=max_seqlen,
    )


def selected_rows(
    selected: Tensor, document: Tensor, num_documents: int, max_seqlen: int
) -> PackedRows:
    """Lay out some of the tokens in one block; the other tokens have no row.

    For layers that tokens may skip, such as those of Mixture-of-Depths (arXiv 2404.02258).

    Args:
        selected: (M,) int64, the tokens that the block runs on, ascending and distinct. M may be 0.
        document: (n,) int64, the document of every token, selected or not; ascending.
        num_documents: number of documents.
        max_seqlen: upper bound of the documents' lengths, in tokens.

    Returns:
        A layout of M rows, not complete.
    """
    rows_of_token = selected.new_full((document.shape[0],), -1)
    rows_of_token[selected] = torch.arange(selected.shape[0], device=selected.device)
    return _pack(
        tokens=selected,
        slots=torch.zeros_like(selected),
        blocks=torch.zeros_like(selected),
        rows_of_token=rows_of_token[:, None],
        document=document,
        sizes=(1, num_documents),
        max_seqlen=max_seqlen,
        complete=False,
    )


def _pack(
    *,
    tokens: Tensor,
    slots: Tensor,
    blocks: Tensor,
    rows_of_token: Tensor,
    document: Tensor,
    sizes: tuple[int, int],
    max_seqlen: int,
    equal_lengths: bool = False,
    complete: bool = True,
) -> PackedRows:
    """Derive segments and offsets. sizes: numbers of blocks and of documents."""
    num_blocks, num_documents = sizes
    segments = blocks * num_documents + document[tokens]
    starts = torch.arange(num_blocks * num_documents + 1, device=tokens.device)
    cu_seqlens = torch.searchsorted(segments, starts).int()
    return PackedRows(
        tokens=tokens,
        slots=slots,
        blocks=blocks,
        # Not contiguous(), which lets a single element keep its stride: compiled code guards on it.
        offsets=cu_seqlens[num_documents::num_documents].clone(
            memory_format=torch.contiguous_format
        ),
        segments=segments,
        cu_seqlens=cu_seqlens,
        rows_of_token=rows_of_token,
        max_seqlen=max_seqlen,
        equal_lengths=equal_lengths,
        complete=complete,
    )


# Autograd's backward of a gather with repeated indices is slow: it sorts the indices and adds row
# by row. Here the adjoint of each gather is another gather, or a product with a one-hot matrix.


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: PackedRows) -> Tensor:
        ctx.rows = rows
        return x[rows.tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _by_token_and_slot(grad, ctx.rows).sum(dim=1), None


class _GatherPerSlot(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: PackedRows) -> Tensor:
        ctx.rows = rows
        return x[rows.tokens, rows.slots]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _by_token_and_slot(grad, ctx.rows), None


class _GatherPerBlock(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: PackedRows) -> Tensor:
        ctx.rows = rows
        return x[rows.blocks]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        blocks = torch.arange(ctx.rows.num_blocks, device=grad.device)
        one_hot = (ctx.rows.blocks == blocks[:, None]).to(grad.dtype)
        total = one_hot @ grad.flatten(1)
        return total.unflatten(1, grad.shape[1:]) if grad.ndim > 1 else total[:, 0], None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: PackedRows) -> Tensor:
        ctx.rows = rows
        return _by_token_and_slot(x, rows).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rows.tokens], None


def _by_token_and_slot(x: Tensor, rows: PackedRows) -> Tensor:
    """x: (M, ...) -> (n, num_slots, ...), zeros in slots without a row."""
    if not rows.complete:  # index -1 reads the last row
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return x[rows.rows_of_token]
