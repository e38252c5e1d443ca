"""Sorting rows by block in plain PyTorch: a stable sort and a binary search."""

import torch
from torch import Tensor


def sort_by_block_reference(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Sort rows by block. Arguments and returns are those of `sort_by_block`."""
    in_order, order = torch.sort(blocks, stable=True)
    first = torch.arange(num_blocks + 1, device=blocks.device)
    return order, torch.searchsorted(in_order, first)
