"""What a grouped linear layer means, one block at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear_reference(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x: (M, in), weight: (B, out, in), offsets: (B,) ends of the blocks' rows -> (M, out)."""
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    # split and unbind, not indices: their backward passes assemble one gradient, once.
    pieces = zip(x.split(sizes), weight.unbind(), strict=True)
    return torch.cat([F.linear(rows, matrix) for rows, matrix in pieces])
