"""The products and their sum over each token's rows, in plain PyTorch."""

from torch import Tensor

from molcli.kernels.indexed_linear.reference import indexed_linear_reference


def indexed_combine_reference(
    x: Tensor,
    weight: Tensor | None,
    blocks: Tensor,
    gate: Tensor | None,
    residual: Tensor,
    scale: float,
) -> Tensor:
    """Return residual + scale * the sum over each token's rows of gate * W[block] x.

    Args:
        x: (R, in), or (R, out) if `weight` is None.
        weight: (B, out, in), or None if `x` holds the products already.
        blocks: (R,) int64, each row's block.
        gate, residual, scale: as for `indexed_combine`.

    Returns:
        (n, out), in the dtype of `residual`.
    """
    x = x.unflatten(0, (residual.shape[0], -1))
    if gate is not None:  # before the product, where rows are narrower
        x = x * (gate * scale)[..., None].to(x.dtype)
    elif scale != 1.0:
        x = x * scale
    x = x.flatten(0, 1)
    if weight is not None:
        x = indexed_linear_reference(x, [weight], blocks)
    return residual + x.unflatten(0, (residual.shape[0], -1)).sum(1)
