"""Gated DeltaNet that starts from softmax attention's projections."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.rows import Rows
from molcli.model.gated_deltanet import StackedGatedDeltaNet

# SiLU is nearly linear for small inputs; q and k are normalised after it, and the read-out too.
INPUT_RMS = 0.3
# A gate that every token opens alike: what the linear map can give of a constant.
GATE = 1.0
# Half-lives of the heads' memories, in the block's own tokens.
SHORTEST, LONGEST = 16.0, 256.0


def set_gated_deltanet(
    mixer: StackedGatedDeltaNet,
    read: Tensor,
    rows: Rows,
    regress: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Sets everything but q, k, v (already fitted) and o (fitted next).

    Convolutions pass their input through, decay is spread over the heads, beta is one half, and the
    gate is as constant as a linear map of the input can make it: at first no token is special.
    read: (M, d), what the blocks read. regress: features, wanted -> a (B, q, p) map.
    """
    for name in ("q", "k", "v"):
        weight, conv = getattr(mixer, f"{name}_proj"), getattr(mixer, f"{name}_conv")
        weight.mul_(INPUT_RMS / grouped_linear(read, weight, rows).square().mean().sqrt())
        conv.zero_()
        conv[..., -1] = 1.0
    for weight in (mixer.a_proj, mixer.b_proj, mixer.A_log):
        weight.zero_()
    heads = mixer.A_log.shape[1]
    half_lives = torch.logspace(math.log2(SHORTEST), math.log2(LONGEST), heads, base=2.0)
    rate = (math.log(2.0) / half_lives).to(mixer.dt_bias)
    mixer.dt_bias.copy_(torch.log(torch.expm1(rate)).expand_as(mixer.dt_bias))
    mixer.g_proj.copy_(regress(read, read.new_full((read.shape[0], mixer.g_proj.shape[1]), GATE)))
    mixer.o_norm.fill_(1.0)
