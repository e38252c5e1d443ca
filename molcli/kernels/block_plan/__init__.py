"""Which rows belong to each block, for a few hundred rows in any order."""

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.block_plan.reference import block_plan_reference

__all__ = ["block_plan", "block_plan_reference"]

# The kernel compares every row with every other one.
MAX_ROWS = 1024


@torch.library.custom_op("molcli::block_plan", mutates_args=())
def block_plan(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """blocks: (R,) int64 -> the rows sorted by block, stably, (R,) int64, and where the blocks
    begin among them, (num_blocks + 1,) int64. Does not wait for the device.
    """
    if backend.on_triton(blocks) and blocks.shape[0] <= MAX_ROWS:
        from molcli.kernels.block_plan.triton_kernels import launch

        return launch(blocks, num_blocks)
    return block_plan_reference(blocks, num_blocks)


@block_plan.register_fake
def _(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(blocks), blocks.new_empty(num_blocks + 1)
