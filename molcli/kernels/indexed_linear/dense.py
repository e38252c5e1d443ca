"""Many rows of one block: ordinary matrix products, with the rest in a few passes over the rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.indexed_linear.reference import activate

# At R rows, a product of half-precision matrices does about R operations for a byte of weights. A
# GPU that does a few hundred operations in the time of reading a byte (an H200 167) is limited by
# its arithmetic from here on. Our kernel has one program for 32 outputs and all rows of a block,
# which for a single block leaves most multiprocessors idle.
MIN_DENSE_ROWS = 256


def suits_dense(weights: list[Tensor], rows: int) -> bool:
    """Return whether ordinary products are faster: all of many rows have the same block.

    Args:
        weights: (B, out, in) each.
        rows: number of rows.
    """
    return weights[0].shape[0] == 1 and rows >= MIN_DENSE_ROWS


def dense_linear(
    x: Tensor,
    weights: list[Tensor],
    delta: Tensor | None,
    norm: Tensor | None,
    eps: float,
    activation: str | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Run the layer for rows of block 0.

    Args:
        x: (R, in), one value a row.
        Others: as for `indexed_linear`, of a single block.

    Returns:
        (R, out), in the dtype of `x`.
    """
    h = x if delta is None else x + delta
    if norm is not None:  # one kernel on CUDA, which rounds once
        h = F.rms_norm(h, h.shape[-1:], norm[0].to(h.dtype), eps)
    sizes = [w.shape[1] for w in weights]
    y = x.new_empty(x.shape[0], sum(sizes))
    for w, part in zip(weights, y.split(sizes, dim=-1), strict=True):
        torch.mm(h, w[0].t(), out=part)  # in place: no copy that joins the parts
    if bias is not None:
        y += bias[0].to(y.dtype)
    if activation is not None:
        y = _activated(y, activation, sizes[0])
    return y if residual is None else y.add_(residual)


def _activated(y: Tensor, name: str, size: int) -> Tensor:
    if backend.use_triton(y):
        from molcli.kernels.indexed_linear.triton_kernels import ACTIVATIONS, launch_activation

        if name in ACTIVATIONS:  # gated or not, one pass over the rows
            return launch_activation(y, name, size)
    return activate(y, name, size)
