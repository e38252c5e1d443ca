"""One decoding step of Gated DeltaNet (arXiv 2412.06464), with states updated in place."""

import torch
from torch import Tensor

from molcli.kernels import backend
from molcli.kernels.gated_delta_step.reference import gated_delta_step_reference

__all__ = ["gated_delta_step", "gated_delta_step_reference"]


@torch.library.custom_op("molcli::gated_delta_step", mutates_args=("conv_state", "state"))
def gated_delta_step(
    projected: Tensor,
    convs: list[Tensor],
    a_log: Tensor,
    dt_bias: Tensor,
    o_norm: Tensor,
    conv_state: Tensor,
    state: Tensor,
    blocks: Tensor,
    active: Tensor,
    eps: float,
) -> Tensor:
    """Run a Gated DeltaNet mixer on one new token per row, between its projections.

    In order: convolution, SiLU, q and k to unit length, decay exp(-exp(a_log) softplus(a +
    dt_bias)), write strength sigmoid(b), gated delta rule, RMSNorm of the output, times SiLU(g).

    Args:
        projected: (R, 4 H D + 2 H), the projections q, k, v, g (H D each) and a, b (H each). Row
            token * slots + slot; a sequence's rows are in different blocks.
        convs: the convolution filters of q, k and v, (num_blocks, H D, 4) each.
        a_log, dt_bias: (num_blocks, H).
        o_norm: (num_blocks, D), weight of the output's RMSNorm.
        conv_state: (B, num_blocks, 3 H D, 3), the last inputs of the convolutions. Updated in place
            for active sequences.
        state: (B, num_blocks, H, D, D) float32, recurrent states. Updated in place for active
            sequences.
        blocks: (R,) int64, each row's block.
        active: (B,) int32, 0 for a sequence whose new token is padding.
        eps: added to the mean square in the output's RMSNorm.

    Returns:
        (R, H D), the input of the output projection.

    Source: arXiv 2412.06464, equation 10 and section 3.4.
    """
    arguments = (projected, convs, a_log, dt_bias, o_norm, conv_state, state, blocks, active, eps)
    if backend.use_triton(projected):
        from molcli.kernels.gated_delta_step.triton_kernels import launch

        return launch(*arguments)
    return gated_delta_step_reference(*arguments)


@gated_delta_step.register_fake
def _(
    projected: Tensor,
    convs: list[Tensor],
    a_log: Tensor,
    dt_bias: Tensor,
    o_norm: Tensor,
    conv_state: Tensor,
    state: Tensor,
    blocks: Tensor,
    active: Tensor,
    eps: float,
) -> Tensor:
    return projected.new_empty(projected.shape[0], state.shape[2] * state.shape[-1])
