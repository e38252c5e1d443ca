"""The way back from thin rows to tokens: a linear layer per row, summed over a token's rows."""

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
    share: Tensor | None,
    base: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """base + scale * the sum over each token's rows of share * W[block] x.

    x: (R, in), weight: (B, out, in), share: (n, slots) float32 or None for ones, base: (n, out)
    -> (n, out). Many rows pass through `indexed_linear`, which reads each block once.
    """
    if rows.plan is None:
        return _indexed_combine(x, weight, rows.blocks, share, base, scale)
    wide = indexed_linear(x, [weight], rows)
    return _indexed_combine(wide, None, rows.blocks, share, base, scale)


@torch.library.custom_op("molcli::indexed_combine", mutates_args=())
def _indexed_combine(
    x: Tensor,
    weight: Tensor | None,
    blocks: Tensor,
    share: Tensor | None,
    base: Tensor,
    scale: float,
) -> Tensor:
    """weight: None where x has been multiplied by it."""
    if backend.on_triton(x):
        from molcli.kernels.indexed_combine.triton_kernels import launch, launch_sum

        if weight is None:
            return launch_sum(x, share, base, scale)
        return launch(x, weight, blocks, share, base, scale)
    return indexed_combine_reference(x, weight, blocks, share, base, scale)


@_indexed_combine.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    blocks: Tensor,
    share: Tensor | None,
    base: Tensor,
    scale: float,
) -> Tensor:
    return torch.empty_like(base)
