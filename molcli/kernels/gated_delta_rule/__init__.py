"""Gated delta rule over ragged segments (Gated DeltaNet, arXiv 2412.06464)."""

from torch import Tensor

from molcli.kernels.gated_delta_rule.chunked import chunk_gated_delta_rule_fla
from molcli.kernels.gated_delta_rule.fla import fla_is_sound
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
    state: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """q, k, v: (M, H, d), q and k of unit length; g = log decay, beta: (M, H), float32;
    state: (segments, H, d_k, d_v), float32, before each segment, or None for zeros.

    Returns outputs (M, H, d_v) and, where states were given, those after each segment. On CUDA
    this is fla-core's chunk kernel, once a gradient check has passed on the GPU at hand; elsewhere,
    and for segments of one token, the eager reference.
    """
    if q.is_cuda and max_seqlen > 1 and fla_is_sound(q.device.index or 0, q.shape[-1]):
        return chunk_gated_delta_rule_fla(q, k, v, g, beta, cu_seqlens, state)
    if state is not None:
        return gated_delta_rule_reference(q, k, v, g, beta, cu_seqlens, state)
    zeros = g.new_zeros(cu_seqlens.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2])
    return gated_delta_rule_reference(q, k, v, g, beta, cu_seqlens, zeros)[0], None
