"""Sampling: draw a token from each row of logits in one launch, with one random number a row."""

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.draw_tokens.reference import draw_tokens_reference

__all__ = ["draw_tokens", "draw_tokens_reference"]


@torch.library.custom_op("molcli::draw_tokens", mutates_args=())
def draw_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draw one index from softmax(logits / temperature) of each row.

    It inverts the cumulative distribution: the drawn index is the first one up to which the odds
    sum to more than `uniform` of their total. So the same numbers draw the same tokens.

    Args:
        logits: (B, V).
        uniform: (B,) float64, each in [0, 1).
        temperature: above 0.

    Returns:
        (B,) int64; -1 for a row whose softmax is not finite.
    """
    if backend.use_triton(logits):
        from molcli.kernels.draw_tokens.triton_kernels import launch

        return launch(logits, uniform, temperature)
    return draw_tokens_reference(logits, uniform, temperature)


@draw_tokens.register_fake
def _(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
