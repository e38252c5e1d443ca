"""Rows of one decoding step: token by token, each with a block of its own.

With one new token a sequence there is nothing to sort: row `token * slots + slot` belongs to the
token's slot-th block. Where many rows share few blocks, a plan says which rows each block has, so
that its weights are read once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.kernels.block_plan import block_plan

# Up to here a program per row reads its block's weights from the cache often enough.
PLANNED_FROM = 17


@dataclass(frozen=True)
class Plan:
    """order: (R,) int64, the rows sorted by block. starts: (B + 1,) int64, where blocks begin."""

    order: Tensor
    starts: Tensor


@dataclass(frozen=True)
class BlockRows:
    """blocks: (R,) int64. slots: rows a token. num_blocks: B. plan: from PLANNED_FROM rows on."""

    blocks: Tensor
    slots: int
    num_blocks: int
    plan: Plan | None

    @property
    def count(self) -> int:
        return self.blocks.shape[0]


def chosen_rows(chosen: Tensor, num_blocks: int) -> BlockRows:
    """chosen: (n, slots) int64, the blocks of each token."""
    blocks = chosen.flatten()
    plan = None
    if blocks.shape[0] >= PLANNED_FROM:
        plan = Plan(*block_plan(blocks, num_blocks))
    return BlockRows(blocks, chosen.shape[1], num_blocks, plan)


def every_block(num_tokens: int, num_blocks: int, device: torch.device) -> BlockRows:
    """Every token in every block."""
    # Not expand(): kernels take the blocks of neighbouring rows to be neighbours in memory.
    blocks = torch.arange(num_blocks, device=device).repeat(num_tokens, 1)
    return chosen_rows(blocks, num_blocks)
