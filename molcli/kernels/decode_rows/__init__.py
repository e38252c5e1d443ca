"""Rows of one decoding step: token by token, each with a block of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.decode_rows.reference import block_plan_reference

__all__ = ["block_plan", "block_plan_reference"]

# The kernel compares every row with every other one.
MAX_ROWS = 1024


@torch.library.custom_op("molcli::block_plan", mutates_args=())
def block_plan(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """blocks: (R,) int64 -> the rows sorted by block, stably, (R,) int64, and where the blocks
    begin among them, (num_blocks + 1,) int64. Does not wait for the device.
    """
    if backend.on_triton(blocks) and blocks.shape[0] <= MAX_ROWS:
        from molcli.kernels.decode_rows.triton_kernels import launch

        return launch(blocks, num_blocks)
    return block_plan_reference(blocks, num_blocks)


@block_plan.register_fake
def _(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(blocks), blocks.new_empty(num_blocks + 1)


# Up to here a program per row reads its block's weights from the cache often enough.
PLANNED_FROM = 17


@dataclass(frozen=True)
class Plan:
    """order: (R,) int64, the rows sorted by block. starts: (B + 1,) int64, where blocks begin."""

    order: Tensor
    starts: Tensor


@dataclass(frozen=True)
class DecodeRows:
    """blocks: (R,) int64. slots: rows a token. num_blocks: B. plan: from PLANNED_FROM rows on."""

    blocks: Tensor
    slots: int
    num_blocks: int
    plan: Plan | None

    @property
    def count(self) -> int:
        return self.blocks.shape[0]


def chosen_rows(chosen: Tensor, num_blocks: int) -> DecodeRows:
    """chosen: (n, slots) int64, the blocks of each token."""
    blocks = chosen.flatten()
    plan = None
    if blocks.shape[0] >= PLANNED_FROM:
        plan = Plan(*block_plan(blocks, num_blocks))
    return DecodeRows(blocks, chosen.shape[1], num_blocks, plan)


def every_block(num_tokens: int, num_blocks: int, device: torch.device) -> DecodeRows:
    """Every token in every block."""
    # Not expand(): kernels take the blocks of neighbouring rows to be neighbours in memory.
    blocks = torch.arange(num_blocks, device=device).repeat(num_tokens, 1)
    return chosen_rows(blocks, num_blocks)
