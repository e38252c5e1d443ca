"""The routing decision of `molcli.model.routing.router`, over a few tokens."""

from torch import Tensor

from molcli.kernels.router_logits import router_logits_reference


def route_reference(
    x: Tensor, weight: Tensor, correction_bias: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (n, d) residual, weight: (R, d), correction_bias: (R,) -> logits (n, R) float32 or higher,
    the chosen blocks (n, k) int64 and their weights (n, k).
    """
    logits = router_logits_reference(x, weight)
    return logits, *choose(logits, correction_bias, top_k)


def choose(logits: Tensor, correction_bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """logits: (n, R), correction_bias: (R,), which takes part in the choice alone -> the chosen
    blocks (n, k) int64 and their weights (n, k).

    Ties go to the block with the lower index; weights are a softmax over the chosen, with k = 1
    over all.
    """
    biased = logits.detach() + correction_bias
    blocks = biased.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    if top_k == 1:  # renormalising would cut the router off from the loss
        return blocks, logits.softmax(-1).gather(1, blocks)
    return blocks, logits.gather(1, blocks).softmax(-1)
