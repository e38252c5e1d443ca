"""The grouped matmul of torch, with a gradient of the weights that fills a GPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# A weight gradient has few output tiles, each a sum over all rows of its block: 0.3 ms at 131,072
# rows on an H100, whatever its size. Fewer than its multiprocessors leave some of them idle.
_TILE = 128
_BUSY = 132
_WANTED = 512
_FEWEST_ROWS = 256  # in a part of a block; shorter sums cost more than they save
_MOST_GROUPS = 1024  # of one call
_ALIGNED = 8  # grouped_mm reads rows of a multiple of 16 bytes


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x: (M, in), weight: (B, out, in), ends: (B,) int32 of the blocks' rows -> (M, out), bf16.

    Odd widths, such as those of a few heads' gates, are filled up with zeros: the output's too, for
    its gradient is an input.
    """
    wide, deep = weight.shape[1:]
    more, deeper = -wide % _ALIGNED, -deep % _ALIGNED
    if more or deeper:
        x, weight = F.pad(x, (0, deeper)), F.pad(weight, (0, deeper, 0, more))
    out: Tensor = GroupedProduct.apply(x, weight, ends)  # type: ignore[no-untyped-call]
    return out[:, :wide] if more else out


class GroupedProduct(Function):
    """As `grouped_product`, of even widths.

    A weight's gradient is summed by parts of its block's rows, side by side, then over the parts in
    float32: no atomics, hence the same bits in every run.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return F.grouped_mm(x, weight.mT, offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        for_x = F.grouped_mm(grad, weight, offs=ends) if ctx.needs_input_grad[0] else None
        for_weight = None
        if ctx.needs_input_grad[1]:
            parts = parts_of_blocks(weight.shape, x.shape[0])
            sums = F.grouped_mm(grad.mT, x, offs=part_ends(ends, parts))
            if parts > 1:
                by_part = sums.unflatten(0, (-1, parts))
                sums = by_part.sum(1, dtype=torch.float32).to(weight.dtype)
            for_weight = sums
        return for_x, for_weight, None


def parts_of_blocks(weight: torch.Size, num_rows: int) -> int:
    """In how many parts to sum the gradient of a weight (B, out, in)."""
    blocks, wide, deep = weight
    tiles = blocks * -(-wide // _TILE) * -(-deep // _TILE)
    if tiles >= _BUSY:
        return 1
    parts = min(-(-_WANTED // tiles), _MOST_GROUPS // blocks)
    while parts > 1 and num_rows < blocks * parts * _FEWEST_ROWS:
        parts //= 2
    return max(1, parts)


def part_ends(ends: Tensor, parts: int) -> Tensor:
    """ends: (B,) int32 -> (B * parts,) int32: every block's rows in parts of nearly one size."""
    if parts == 1:
        return ends
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])[:, None]
    steps = torch.arange(1, parts + 1, device=ends.device, dtype=torch.int64)
    return (begins + (ends[:, None] - begins) * steps // parts).int().flatten()
