"""Gated DeltaNet (arXiv 2412.06464) over one new token a row, its states updated in place."""

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
    """Convolution, SiLU, unit q and k, gates, delta rule, read-out, its norm and gate.

    projected: (R, 4 H D + 2 H), the projections q, k, v, g (H D each), a, b (H each) of the rows,
    R / B neighbouring rows to a sequence and in different blocks. convs: q's, k's and v's filters,
    (blocks, H D, 4). a_log, dt_bias: (blocks, H). o_norm: (blocks, D). blocks: (R,) int64.
    conv_state: (B, blocks, 3 H D, 3) and state: (B, blocks, H, D, D) float32 are moved on by
    one token, but for sequences that are not `active` (B,) int32. Returns (R, H D).
    """
    arguments = (projected, convs, a_log, dt_bias, o_norm, conv_state, state, blocks, active, eps)
    if backend.on_triton(projected):
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
