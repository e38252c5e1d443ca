"""A linear layer in which every row has a block of its own: decoding's matrix products."""

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.decode_rows import DecodeRows
from molcli.kernels.indexed_linear.reference import activate, indexed_linear_reference

__all__ = ["indexed_linear", "indexed_linear_reference"]


def indexed_linear(
    x: Tensor,
    weights: list[Tensor],
    rows: DecodeRows,
    *,
    plus: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    activation: str | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y[r] = residual[r] + f(W[block] h[r] + bias[block]), h = RMSNorm(x[r // d] + plus[r]).

    x: (R / d, in): a row, or one that d neighbouring rows share. weights: up to six of (B, out_i,
    in), whose outputs stand side by side; with `activation`, of transformers' names, one or two:
    act(W_0 h), times W_1 h if there is a second. plus: (R, in). norm: (B, in), bias: (B, out),
    residual: (R, out); what is None is left out. Returns (R, out) in x's dtype.
    """
    order, starts = (None, None) if rows.plan is None else (rows.plan.order, rows.plan.starts)
    arguments = (plus, norm, eps, activation, bias, residual)
    return _indexed_linear(x, weights, rows.blocks, order, starts, *arguments)


@torch.library.custom_op("molcli::indexed_linear", mutates_args=())
def _indexed_linear(
    x: Tensor,
    weights: list[Tensor],
    blocks: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    plus: Tensor | None,
    norm: Tensor | None,
    eps: float,
    activation: str | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    if backend.on_triton(x):
        from molcli.kernels.indexed_linear.triton_kernels import ACTIVATIONS, launch

        rows = (x, weights, blocks, order, starts, plus, norm, eps)
        if activation is None or activation in ACTIVATIONS:
            return launch(*rows, activation, bias, residual)
        y = activate(launch(*rows, None, bias, None), activation, weights[0].shape[1])
        return y if residual is None else residual + y
    return indexed_linear_reference(
        x,
        weights,
        blocks,
        plus=plus,
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
    plus: Tensor | None,
    norm: Tensor | None,
    eps: float,
    activation: str | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    kept = weights if activation is None else weights[:1]
    return x.new_empty(blocks.shape[0], sum(w.shape[1] for w in kept))
