"""Which routed blocks each of a few tokens visits, and with what weights, in one launch."""

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.route.reference import choose, route_reference

__all__ = ["choose", "route", "route_reference"]


@torch.library.custom_op("molcli::route", mutates_args=())
def route(
    x: Tensor, weight: Tensor, correction_bias: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (n, d), weight: (R, d), correction_bias: (R,) -> logits (n, R), blocks (n, k) int64,
    weights (n, k); float32, or float64 for such an x.
    """
    if backend.on_triton(x):
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
