"""Decoding's linear layers: every row is multiplied by the weight of its own block."""

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.decode_rows import DecodeRows
from molcli.kernels.indexed_linear.dense import dense_linear, suits_dense
from molcli.kernels.indexed_linear.reference import activate, indexed_linear_reference

__all__ = ["indexed_linear", "indexed_linear_reference"]


def indexed_linear(
    x: Tensor,
    weights: list[Tensor],
    rows: DecodeRows,
    *,
    delta: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    activation: str | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return residual + act(W[block] h + bias[block]), with h = RMSNorm(x + delta).

    On CUDA one Triton kernel for all of it; elsewhere the reference. Many rows of a single block
    take ordinary matrix products. Whatever is None is left out.

    Args:
        x: (R / d, in), a value for every d neighbouring rows; d is 1, or a token's number of rows.
        weights: up to six of (B, out_i, in), whose outputs are concatenated. With an activation
            one or two: a second one makes the layer gated, act(W_0 h) * W_1 h.
        rows: the layout of R rows in B blocks.
        delta: (R, in), added to `x` before the norm.
        norm: (B, in), weight of the RMSNorm; None for no norm.
        eps: added to the mean square in the RMSNorm.
        activation: name of an activation in transformers' ACT2FN; None for the identity.
        bias: (B, out), added to the product.
        residual: (R, out), added to the result.

    Returns:
        (R, out), in the dtype of `x`.
    """
    order, starts = None, None
    if rows.by_block is not None:
        order, starts = rows.by_block.order, rows.by_block.starts
    arguments = (delta, norm, eps, activation, bias, residual)
    return _indexed_linear(x, weights, rows.blocks, order, starts, *arguments)


@torch.library.custom_op("molcli::indexed_linear", mutates_args=())
def _indexed_linear(
    x: Tensor,
    weights: list[Tensor],
    blocks: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    delta: Tensor | None,
    norm: Tensor | None,
    eps: float,
    activation: str | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    if suits_dense(weights, blocks.shape[0]) and len(x) == len(blocks):
        return dense_linear(x, weights, delta, norm, eps, activation, bias, residual)
    if backend.use_triton(x):
        from molcli.kernels.indexed_linear.triton_kernels import ACTIVATIONS, launch

        rows = (x, weights, blocks, order, starts, delta, norm, eps)
        if activation is None or activation in ACTIVATIONS:
            return launch(*rows, activation, bias, residual)
        y = activate(launch(*rows, None, bias, None), activation, weights[0].shape[1])
        return y if residual is None else residual + y
    return indexed_linear_reference(
        x,
        weights,
        blocks,
        delta=delta,
        norm=norm,
        eps=eps,
        activation=activation,
        bias=bias,
        residual=residual,
    )


@_indexed_linear.register_fake
def _(
    x: Tensor,
    weights: list[Tensor],
    blocks: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    delta: Tensor | None,
    norm: Tensor | None,
    eps: float,
    activation: str | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    outputs = weights if activation is None else weights[:1]
    return x.new_empty(blocks.shape[0], sum(w.shape[1] for w in outputs))
