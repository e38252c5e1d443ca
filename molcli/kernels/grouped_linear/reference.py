"""One linear layer per block in plain PyTorch, block by block."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear_reference(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each row by the weight of its block.

    Args:
        x: (M, in), a value per row.
        weight: (B, out, in), a weight per block.
        offsets: (B,), the end of each block's rows.

    Returns:
        (M, out), in the dtype of `x`.
    """
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    # split and unbind instead of indices: their backward passes assemble one gradient, once.
    pieces = zip(x.split(sizes), weight.unbind(), strict=True)
    return torch.cat([F.linear(rows, matrix) for rows, matrix in pieces])
