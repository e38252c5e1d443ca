"""RMSNorm (arXiv 1910.07467)."""

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each vector to unit root mean square, then by a weight.

    Args:
        x: (..., d). The mean square is computed in float32 or higher.
        weight: broadcastable to x.
        eps: added to the mean square.

    Returns:
        (..., d), dtype of x.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return weight * exact.to(x.dtype)


class FinalNorm(nn.Module):
    """RMSNorm at full width, after the last layer."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (..., d)."""
        return rms_norm(x, self.weight, self.eps)
