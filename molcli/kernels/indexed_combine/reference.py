"""The sum over a token's rows, in plain PyTorch."""

from torch import Tensor

from molcli.kernels.indexed_linear.reference import indexed_linear_reference


def indexed_combine_reference(
    x: Tensor,
    weight: Tensor | None,
    blocks: Tensor,
    share: Tensor | None,
    base: Tensor,
    scale: float,
) -> Tensor:
    """Shapes as `indexed_combine`; weight: None where x has been multiplied by it."""
    x = x.unflatten(0, (base.shape[0], -1))
    if share is not None:  # at the narrower width, where it is cheaper
        x = x * (share * scale)[..., None].to(x.dtype)
    elif scale != 1.0:
        x = x * scale
    x = x.flatten(0, 1)
    if weight is not None:
        x = indexed_linear_reference(x, [weight], blocks)
    return base + x.unflatten(0, (base.shape[0], -1)).sum(1)
