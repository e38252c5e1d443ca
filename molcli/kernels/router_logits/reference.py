"""The router's logits in plain PyTorch: a norm without parameters, then a product."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # added to the mean square


def router_logits_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Return W x / rms(x), computed in float32 or higher.

    Args:
        x: (n, d), the residual.
        weight: (R, d), the router's weight for R blocks.

    Returns:
        (n, R), in float32, or float64 if `x` is.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    x = x.to(exact)
    return F.linear(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS), weight.to(exact))
