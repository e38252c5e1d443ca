"""Choose the routed blocks that a token visits, and their weights."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molcli.kernels.route import select_blocks
from molcli.kernels.router_logits import router_logits


@dataclass(frozen=True)
class Routing:
    """The routing of n unpadded tokens to R routed blocks, in one layer.

    Attributes:
        logits: (n, R) float32.
        blocks: (n, k) int64, the chosen blocks.
        weights: (n, k) float32; they sum to 1 if k > 1.
    """

    logits: Tensor
    blocks: Tensor
    weights: Tensor


class Router(nn.Module):
    """A linear router in float32.

    The paper's router reads the residual as it is. Here the residual is first scaled to unit mean
    square, without parameters: the order of the logits is the same, but their size no longer grows
    with the residual, whose norm in a trained parent rises a hundredfold with depth and would
    saturate the softmax. `correction_bias` is added for the choice of blocks, not for the weights
    (arXiv 2408.15664); it is zero unless training sets it.
    """

    def __init__(self, hidden_size: int, num_blocks: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_blocks, hidden_size))
        self.register_buffer("correction_bias", torch.zeros(num_blocks))
        self.correction_bias: Tensor

    def forward(self, x: Tensor) -> Routing:
        """Route the residual x, (n, d_model). The block with the lower index wins a tie."""
        logits = router_logits(x, self.weight)
        return Routing(logits, *select_blocks(logits, self.correction_bias, self.top_k))
