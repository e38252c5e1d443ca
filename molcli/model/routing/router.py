"""Which routed blocks a token visits, and with what weights."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molcli.kernels.route import select_blocks
from molcli.kernels.router_logits import router_logits


@dataclass(frozen=True)
class Routing:
    """One layer's decisions about n unpadded tokens and R routed blocks.

    logits: (n, R) float32. blocks: (n, k) int64, the chosen blocks. weights: (n, k) float32;
    they sum to 1 when k > 1.
    """

    logits: Tensor
    blocks: Tensor
    weights: Tensor


class Router(nn.Module):
    """A linear router in float32.

    The paper's router reads the residual as it is. Here the residual is first brought to unit
    mean square, without parameters: the order of the logits is the same, but their size no longer
    grows with the residual, whose norm in a trained parent rises a hundredfold with depth and
    would saturate the softmax. `correction_bias` takes part in the choice and not in the weights
    (arXiv 2408.15664); it is zero unless something sets it.
    """

    def __init__(self, hidden_size: int, num_blocks: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_blocks, hidden_size))
        self.register_buffer("correction_bias", torch.zeros(num_blocks))
        self.correction_bias: Tensor

    def forward(self, x: Tensor) -> Routing:
        """x: (n, d_model) residual. Ties go to the block with the lower index."""
        logits = router_logits(x, self.weight)
        return Routing(logits, *select_blocks(logits, self.correction_bias, self.top_k))
