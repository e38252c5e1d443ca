"""The routing decision of `molcli.model.router`, over a few tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor


def route_reference(
    x: Tensor, weight: Tensor, correction_bias: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (n, d) residual, weight: (R, d), correction_bias: (R,) -> logits (n, R) float32 or higher,
    the chosen blocks (n, k) int64 and their weights (n, k).

    The residual is brought to unit mean square first. Ties go to the block with the lower index;
    weights are a softmax over the chosen, with k = 1 over all.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    x = x.to(exact)
    logits = F.linear(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6), weight.to(exact))
    biased = logits.detach() + correction_bias
    blocks = biased.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    if top_k == 1:  # renormalising would cut the router off from the loss
        return logits, blocks, logits.softmax(-1).gather(1, blocks)
    return logits, blocks, logits.gather(1, blocks).softmax(-1)
