"""Gated delta rule over ragged segments (Gated DeltaNet, arXiv 2412.06464)."""

from torch import Tensor

from molcli.kernels.gated_delta_rule.fla import chunk_gated_delta_rule_fla, fla_is_sound
from molcli.kernels.gated_delta_rule.reference import (
    gated_delta_rule_reference,
    recurrent_gated_delta_rule,
)

__all__ = ["gated_delta_rule", "gated_delta_rule_reference", "recurrent_gated_delta_rule"]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """q, k, v: (M, H, d), q and k of unit length; g = log decay, beta: (M, H), float32;
    state: (segments, H, d_k, d_v), float32, before each segment.

    Returns outputs (M, H, d_v) and the states after each segment. On CUDA this is fla-core's
    chunk kernel, once a gradient check has passed on the GPU at hand; elsewhere, and for segments
    of one token, the eager reference.
    """
    if q.is_cuda and max_seqlen > 1 and fla_is_sound(q.device.index or 0, q.shape[-1]):
        return chunk_gated_delta_rule_fla(q, k, v, g, beta, cu_seqlens, state)
    return gated_delta_rule_reference(q, k, v, g, beta, cu_seqlens, state)
