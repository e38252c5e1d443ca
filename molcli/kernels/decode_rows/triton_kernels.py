"""Triton kernel: every row counts the rows that precede it in the sorted order."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _plan_kernel(
    blocks, order, starts,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK_R)
    mine = tl.load(blocks + row, mask=row < ROWS, other=BLOCKS).to(tl.int32)
    b = tl.arange(0, BLOCK_B)
    rank = tl.zeros((BLOCK_R,), tl.int32)
    begin = tl.zeros((BLOCK_B,), tl.int32)
    for start in range(0, ROWS, PIECE):
        other = start + tl.arange(0, PIECE)
        theirs = tl.load(blocks + other, mask=other < ROWS, other=BLOCKS).to(tl.int32)
        earlier = (theirs[None, :] == mine[:, None]) & (other[None, :] < row[:, None])
        rank += tl.sum(((theirs[None, :] < mine[:, None]) | earlier).to(tl.int32), 1)
        begin += tl.sum((theirs[None, :] < b[:, None]).to(tl.int32), 1)
    tl.store(order + rank, row.to(tl.int64), mask=row < ROWS)
    tl.store(starts + b, begin.to(tl.int64), mask=b <= BLOCKS)


def launch(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Sort rows by block. Arguments and returns are those of `sort_by_block`."""
    rows = blocks.shape[0]
    order, starts = torch.empty_like(blocks), blocks.new_empty(num_blocks + 1)
    _plan_kernel[(1,)](
        blocks, order, starts, ROWS=rows, BLOCKS=num_blocks,
        BLOCK_R=triton.next_power_of_2(rows), BLOCK_B=triton.next_power_of_2(num_blocks + 1),
        PIECE=32, num_warps=8,
    )  # fmt: skip
    return order, starts
