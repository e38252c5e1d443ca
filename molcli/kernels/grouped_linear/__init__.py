"""One linear layer per block, on rows sorted by block."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.kernels.grouped_linear.grouped_product import grouped_product
from molcli.kernels.grouped_linear.reference import grouped_linear_reference
from molcli.kernels.packed_rows import PackedRows

__all__ = ["grouped_linear", "grouped_linear_reference", "grouped_linears"]

# From this many rows on, one product with concatenated weights is faster than several narrow ones:
# the concatenation costs less than the narrow products lose.
_MIN_CONCATENATED_ROWS = 1024


def grouped_linear(
    x: Tensor, weight: Tensor, rows: PackedRows, bias: Tensor | None = None
) -> Tensor:
    """Multiply each row by the weight of its block.

    On CUDA in bf16 this is `torch.nn.functional.grouped_mm`; elsewhere a loop over blocks.

    Args:
        x: (M, in), a value per row.
        weight: (B, out, in), a weight per block.
        rows: the layout of M rows in B blocks.
        bias: (B, out), a bias per block, or None.

    Returns:
        (M, out), in the dtype of `x`, or in autocast's if autocast is enabled.
    """
    if torch.is_autocast_enabled(x.device.type):  # autocast does not cover grouped_mm
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if weight.shape[0] == 1:
        # The bias as a vector: cuBLAS adds it itself, while a matrix would be copied first.
        return F.linear(x, weight[0], None if bias is None else bias[0].to(x.dtype))
    if x.is_cuda and x.dtype == torch.bfloat16:
        out = grouped_product(x, weight, rows.offsets)
    else:
        out = grouped_linear_reference(x, weight, rows.offsets)
    return out if bias is None else out + rows.gather_per_block(bias).to(out.dtype)


def grouped_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    rows: PackedRows,
    biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Apply several grouped linear layers to the same rows, in one product where that is faster.

    Args:
        x: (M, in), a value per row.
        weights: (B, out_i, in) each.
        rows: the layout of M rows in B blocks.
        biases: (B, out_i) each, or None; either all layers have a bias or none has.

    Returns:
        (M, out_i) each, as `grouped_linear`.
    """
    each = [None] * len(weights) if biases is None else list(biases)
    if weights[0].shape[0] == 1 or not x.is_cuda or x.shape[0] < _MIN_CONCATENATED_ROWS:
        pairs = zip(weights, each, strict=True)
        return tuple(grouped_linear(x, weight, rows, bias) for weight, bias in pairs)
    bias = torch.cat([b for b in each if b is not None], dim=1) if each[0] is not None else None
    joint = grouped_linear(x, torch.cat(list(weights), dim=1), rows, bias)
    return joint.split([weight.shape[1] for weight in weights], dim=-1)
