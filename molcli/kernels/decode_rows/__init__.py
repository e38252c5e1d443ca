"""DecodeRows: the rows of one decoding step, in token order, each with a block of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.decode_rows.reference import sort_by_block_reference

__all__ = [
    "BlockOrder",
    "DecodeRows",
    "all_decode_rows",
    "routed_decode_rows",
    "sort_by_block",
    "sort_by_block_reference",
]

# From this many rows on, kernels run one program per block, on rows sorted by block. With fewer,
# they run one program per row: enough of its reads of the block's weights hit the GPU's cache.
MIN_SORTED_ROWS = 17
# The sorting kernel compares every row with every other one.
MAX_KERNEL_ROWS = 1024


@dataclass(frozen=True)
class BlockOrder:
    """Rows sorted by block.

    Attributes:
        order: (R,) int64, the rows, sorted by block; rows of a block keep their order.
        starts: (B + 1,) int64, where each block begins in `order`, and R.
    """

    order: Tensor
    starts: Tensor


@dataclass(frozen=True)
class DecodeRows:
    """The rows of one decoding step: row token * slots + slot, `slots` blocks for every token.

    Attributes:
        blocks: (R,) int64, each row's block.
        num_blocks: number of blocks B.
        by_block: the rows sorted by block, from MIN_SORTED_ROWS rows on, else None.
    """

    blocks: Tensor
    num_blocks: int
    by_block: BlockOrder | None


def routed_decode_rows(routed: Tensor, num_blocks: int) -> DecodeRows:
    """Lay out every token in the blocks that it is routed to.

    Args:
        routed: (n, slots) int64, the blocks of each token.
        num_blocks: number of blocks B.

    Returns:
        n * slots rows.
    """
    blocks = routed.flatten()
    by_block = None
    if blocks.shape[0] >= MIN_SORTED_ROWS:
        by_block = BlockOrder(*sort_by_block(blocks, num_blocks))
    return DecodeRows(blocks, num_blocks, by_block)


def all_decode_rows(num_tokens: int, num_blocks: int, device: torch.device) -> DecodeRows:
    """Lay out every token in every block: num_tokens * num_blocks rows."""
    # Not expand(): kernels need the blocks of neighbouring rows to be neighbours in memory.
    blocks = torch.arange(num_blocks, device=device).repeat(num_tokens, 1)
    return routed_decode_rows(blocks, num_blocks)


@torch.library.custom_op("molcli::sort_by_block", mutates_args=())
def sort_by_block(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Sort rows by block, stably and without host synchronisation.

    On CUDA a Triton kernel, up to MAX_KERNEL_ROWS rows; elsewhere the reference.

    Args:
        blocks: (R,) int64, each row's block.
        num_blocks: number of blocks B.

    Returns:
        (R,) int64, the rows sorted by block, and (B + 1,) int64, where each block begins among
        them.
    """
    if backend.use_triton(blocks) and blocks.shape[0] <= MAX_KERNEL_ROWS:
        from molcli.kernels.decode_rows.triton_kernels import launch

        return launch(blocks, num_blocks)
    return sort_by_block_reference(blocks, num_blocks)


@sort_by_block.register_fake
def _(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(blocks), blocks.new_empty(num_blocks + 1)
