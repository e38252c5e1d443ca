"""Drawing tokens in plain PyTorch."""

import torch
from torch import Tensor


def draw_tokens_reference(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draw one index from each row. Arguments and returns are those of `draw_tokens`.

    torch.multinomial draws a random number for every entry, which takes longer than a small model
    on a CPU.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    probabilities = (logits.to(exact) / temperature).softmax(-1)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    above_zero = 1 - uniform[:, None]  # an entry of probability 0 must not be drawn
    drawn = torch.searchsorted(cumulative, above_zero * cumulative[:, -1:])[:, 0]
    # A row of probabilities is NaN as a whole.
    return torch.where(probabilities[:, 0].isnan(), -1, drawn)
