"""One linear layer per block, on rows sorted by block."""

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.kernels.grouped_linear.reference import grouped_linear_reference
from molcli.kernels.rows import Rows

__all__ = ["grouped_linear", "grouped_linear_reference"]


def grouped_linear(x: Tensor, weight: Tensor, rows: Rows, bias: Tensor | None = None) -> Tensor:
    """x: (M, in), weight: (B, out, in), bias: (B, out) -> (M, out), in x's dtype or autocast's.

    On CUDA in bf16 this is `torch.nn.functional.grouped_mm`; elsewhere a loop over blocks.
    """
    if torch.is_autocast_enabled(x.device.type):  # grouped_mm does not know autocast
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if weight.shape[0] == 1:
        out = F.linear(x, weight[0])
    elif x.is_cuda and x.dtype == torch.bfloat16:
        out = F.grouped_mm(x, weight.mT, offs=rows.offsets)
    else:
        out = grouped_linear_reference(x, weight, rows.offsets)
    return out if bias is None else out + rows.per_row(bias).to(out.dtype)
