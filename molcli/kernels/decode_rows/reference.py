"""A stable sort, and a search for the blocks' first rows."""

import torch
from torch import Tensor


def block_plan_reference(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Shapes as `block_plan`."""
    ordered, order = torch.sort(blocks, stable=True)
    first = torch.arange(num_blocks + 1, device=blocks.device)
    return order, torch.searchsorted(ordered, first)
