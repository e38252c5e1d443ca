"""Decoding's router: logits, selected blocks and weights of a few tokens in one launch."""

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.route.reference import route_reference, select_blocks

__all__ = ["route", "route_reference", "select_blocks"]


@torch.library.custom_op("molcli::route", mutates_args=())
def route(
    x: Tensor, weight: Tensor, correction_bias: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the router's logits, and select each token's blocks and their weights.

    Args:
        x: (n, d), the residual.
        weight: (R, d), the router's weight for R blocks.
        correction_bias: (R,), as for `select_blocks`.
        top_k: number of blocks k of a token.

    Returns:
        Logits, (n, R) in float32, or float64 if `x` is; the selected blocks, (n, k) int64; their
        weights, (n, k) in the dtype of the logits.
    """
    if backend.use_triton(x):
        from molcli.kernels.route.triton_kernels import launch

        return launch(x, weight, correction_bias, top_k)
    return route_reference(x, weight, correction_bias, top_k)


@route.register_fake
def _(
    x: Tensor, weight: Tensor, correction_bias: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape[0], weight.shape[0], dtype=exact),
        x.new_empty(x.shape[0], top_k, dtype=torch.int64),
        x.new_empty(x.shape[0], top_k, dtype=exact),
    )
