"""torch's grouped matmul, with a weight gradient that keeps all of a GPU busy."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# A weight gradient has few output tiles, and each is a sum over all rows of its block: 0.3 ms at
# 131,072 rows on an H100, whatever its size. With fewer tiles than the GPU has multiprocessors,
# some of these are idle. So blocks are divided into parts that are summed at the same time.
_TILE = 128
_NUM_MULTIPROCESSORS = 132
_WANTED_TILES = 512
_MIN_PART_ROWS = 256  # shorter sums cost more than they save
_MAX_GROUPS = 1024  # of one call of grouped_mm
_ALIGNMENT = 8  # elements: grouped_mm reads rows of a multiple of 16 bytes


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each row by the weight of its block, with gradients.

    Widths that are no multiple of 8, such as those of a few heads' gates, are padded with zeros.
    The output's width is padded too, since its gradient is an input of the backward pass.

    Args:
        x: (M, in) bf16, a value per row.
        weight: (B, out, in) bf16, a weight per block.
        offsets: (B,) int32, the end of each block's rows.

    Returns:
        (M, out) bf16.
    """
    num_out, num_in = weight.shape[1:]
    pad_out, pad_in = -num_out % _ALIGNMENT, -num_in % _ALIGNMENT
    if pad_out or pad_in:
        x, weight = F.pad(x, (0, pad_in)), F.pad(weight, (0, pad_in, 0, pad_out))
    out: Tensor = GroupedProduct.apply(x, weight, offsets)  # type: ignore[no-untyped-call]
    return out[:, :num_out] if pad_out else out


class GroupedProduct(Function):
    """As `grouped_product`, for aligned widths.

    A block's weight gradient is summed over parts of its rows, all at the same time, then over the
    parts in float32. There are no atomics, hence the same bits in every run.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        return F.grouped_mm(x, weight.mT, offs=offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        x_grad = F.grouped_mm(grad, weight, offs=offsets) if ctx.needs_input_grad[0] else None
        weight_grad = None
        if ctx.needs_input_grad[1]:
            parts = num_gradient_parts(weight.shape, x.shape[0])
            sums = F.grouped_mm(grad.mT, x, offs=part_offsets(offsets, parts))
            if parts > 1:
                by_part = sums.unflatten(0, (-1, parts))
                sums = by_part.sum(1, dtype=torch.float32).to(weight.dtype)
            weight_grad = sums
        return x_grad, weight_grad, None


def num_gradient_parts(weight_shape: torch.Size, num_rows: int) -> int:
    """Choose in how many parts to sum each block's weight gradient.

    Args:
        weight_shape: (B, out, in).
        num_rows: number of rows M of all blocks.

    Returns:
        Number of parts of a block, at least 1.
    """
    num_blocks, num_out, num_in = weight_shape
    tiles = num_blocks * -(-num_out // _TILE) * -(-num_in // _TILE)
    if tiles >= _NUM_MULTIPROCESSORS:
        return 1
    parts = min(-(-_WANTED_TILES // tiles), _MAX_GROUPS // num_blocks)
    while parts > 1 and num_rows < num_blocks * parts * _MIN_PART_ROWS:
        parts //= 2
    return max(1, parts)


def part_offsets(offsets: Tensor, parts: int) -> Tensor:
    """Divide every block's rows into parts whose sizes differ by at most 1.

    Args:
        offsets: (B,) int32, the end of each block's rows.
        parts: number of parts of a block.

    Returns:
        (B * parts,) int32, the end of each part's rows.
    """
    if parts == 1:
        return offsets
    begins = torch.cat([offsets.new_zeros(1), offsets[:-1]])[:, None]
    steps = torch.arange(1, parts + 1, device=offsets.device, dtype=torch.int64)
    return (begins + (offsets[:, None] - begins) * steps // parts).int().flatten()
