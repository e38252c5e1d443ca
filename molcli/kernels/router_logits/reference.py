"""A norm without parameters and a product, one after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # added to the mean square


def router_logits_reference(x: Tensor, weight: Tensor) -> Tensor:
    """x: (n, d), weight: (R, d) -> (n, R) float32 or higher: W x / rms(x), in that precision."""
    exact = torch.promote_types(x.dtype, torch.float32)
    x = x.to(exact)
    return F.linear(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS), weight.to(exact))
