"""Top-k routing in plain PyTorch."""

from torch import Tensor

from molcli.kernels.router_logits import router_logits_reference


def route_reference(
    x: Tensor, weight: Tensor, correction_bias: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute logits, and select each token's blocks and their weights.

    Arguments and returns are those of `route`.
    """
    logits = router_logits_reference(x, weight)
    return logits, *select_blocks(logits, correction_bias, top_k)


def select_blocks(logits: Tensor, correction_bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Select each token's blocks, and weight them.

    A tie goes to the block with the lower index. The weights are a softmax over the selected
    logits; with a k of 1, over all logits.

    Args:
        logits: (n, R), the router's logits.
        correction_bias: (R,), added to the logits for the selection, and not for the weights
            (loss-free balancing, arXiv 2408.15664).
        top_k: number of blocks k of a token.

    Returns:
        The selected blocks, (n, k) int64, and their weights, (n, k) in the dtype of `logits`.
    """
    biased = logits.detach() + correction_bias
    blocks = biased.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    if top_k == 1:  # a softmax over one logit is 1: the router would get no gradient
        return blocks, logits.softmax(-1).gather(1, blocks)
    return blocks, logits.gather(1, blocks).softmax(-1)
