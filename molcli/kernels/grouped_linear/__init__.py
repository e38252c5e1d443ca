"""One linear layer per block, on rows sorted by block."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.kernels.grouped_linear.product import grouped_product
from molcli.kernels.grouped_linear.reference import grouped_linear_reference
from molcli.kernels.packed_rows import PackedRows

__all__ = ["grouped_linear", "grouped_linear_reference", "grouped_linears"]

# From so many rows on, one product with joined weights is quicker than several: a copy of the
# weights costs less than their narrow products lose.
_MANY_ROWS = 1024


def grouped_linear(
    x: Tensor, weight: Tensor, rows: PackedRows, bias: Tensor | None = None
) -> Tensor:
    """x: (M, in), weight: (B, out, in), bias: (B, out) -> (M, out), in x's dtype or autocast's.

    On CUDA in bf16 this is `torch.nn.functional.grouped_mm`; elsewhere a loop over blocks.
    """
    if torch.is_autocast_enabled(x.device.type):  # grouped_mm does not know autocast
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if weight.shape[0] == 1:
        # The bias as a vector: cuBLAS adds one itself, where a matrix would first be copied.
        return F.linear(x, weight[0], None if bias is None else bias[0].to(x.dtype))
    if x.is_cuda and x.dtype == torch.bfloat16:
        out = grouped_product(x, weight, rows.offsets)
    else:
        out = grouped_linear_reference(x, weight, rows.offsets)
    return out if bias is None else out + rows.per_row(bias).to(out.dtype)


def grouped_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    rows: PackedRows,
    biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Several linear layers of the same rows.

    weights: (B, out_i, in) each; biases: (B, out_i) or None each, all of one kind -> (M, out_i)
    each.
    """
    each = [None] * len(weights) if biases is None else list(biases)
    if weights[0].shape[0] == 1 or not x.is_cuda or x.shape[0] < _MANY_ROWS:
        pairs = zip(weights, each, strict=True)
        return tuple(grouped_linear(x, weight, rows, bias) for weight, bias in pairs)
    bias = torch.cat([b for b in each if b is not None], dim=1) if each[0] is not None else None
    joint = grouped_linear(x, torch.cat(list(weights), dim=1), rows, bias)
    return joint.split([weight.shape[1] for weight in weights], dim=-1)
