"""Decoding's way back from thin rows to tokens: a linear layer per row, summed over each token."""

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.decode_rows import DecodeRows
from molcli.kernels.indexed_combine.reference import indexed_combine_reference
from molcli.kernels.indexed_linear import indexed_linear

__all__ = ["indexed_combine", "indexed_combine_reference"]


def indexed_combine(
    x: Tensor,
    weight: Tensor,
    rows: DecodeRows,
    gate: Tensor | None,
    residual: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """Return residual + scale * the sum over each token's rows of gate * W[block] x.

    Few rows take one Triton kernel on CUDA. Many, those that are sorted by block, first pass
    through `indexed_linear`, which reads each block's weight once.

    Args:
        x: (R, in), a value per row, row token * slots + slot.
        weight: (B, out, in), a weight per block.
        rows: the layout of R rows in B blocks.
        gate: (n, slots) float32, a factor per row, or None for ones.
        residual: (n, out).
        scale: a factor of all rows.

    Returns:
        (n, out), in the dtype of `residual`.
    """
    if rows.by_block is None:
        return _indexed_combine(x, weight, rows.blocks, gate, residual, scale)
    products = indexed_linear(x, [weight], rows)
    return _indexed_combine(products, None, rows.blocks, gate, residual, scale)


@torch.library.custom_op("molcli::indexed_combine", mutates_args=())
def _indexed_combine(
    x: Tensor,
    weight: Tensor | None,
    blocks: Tensor,
    gate: Tensor | None,
    residual: Tensor,
    scale: float,
) -> Tensor:
    """weight: None if x holds the products already."""
    if backend.use_triton(x):
        from molcli.kernels.indexed_combine.triton_kernels import launch, launch_sum

        if weight is None:
            return launch_sum(x, gate, residual, scale)
        return launch(x, weight, blocks, gate, residual, scale)
    return indexed_combine_reference(x, weight, blocks, gate, residual, scale)


@_indexed_combine.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    blocks: Tensor,
    gate: Tensor | None,
    residual: Tensor,
    scale: float,
) -> Tensor:
    return torch.empty_like(residual)
