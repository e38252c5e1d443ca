"""The gated delta rule over segments of rows: the recurrence of Gated DeltaNet (arXiv 2412.06464).

With a decay a_t in (0, 1) and a write strength b_t in (0, 1), each head keeps a state S:

    S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T,    o_t = S_t q_t / sqrt(d_k).
"""

from torch import Tensor

from molcli.kernels.gated_delta_rule.fla_check import fla_is_correct
from molcli.kernels.gated_delta_rule.fla_chunk import fla_chunk_gated_delta_rule
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
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the gated delta rule over every segment on its own.

    On CUDA this is fla-core's chunk kernel in bf16, once its gradients have been checked on this
    GPU. Elsewhere, and for segments of one token, it is the eager reference.

    Args:
        q, k: (M, H, d_k), queries and keys of unit length.
        v: (M, H, d_v), values.
        g: (M, H) float32, logarithm of the decay a_t.
        beta: (M, H) float32, write strength b_t.
        cu_seqlens: (num_segments + 1,) int32, bounds of the segments.
        max_seqlen: upper bound of the segments' lengths.
        initial_state: (num_segments, H, d_k, d_v) float32, the state before each segment; None for
            zeros.

    Returns:
        Outputs, (M, H, d_v) in the dtype of `v`, and the state after each segment, or None if
        `initial_state` is None.

    Source: arXiv 2412.06464, equation 10.
    """
    if q.is_cuda and max_seqlen > 1 and fla_is_correct(q.device.index or 0, q.shape[-1]):
        return fla_chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens, initial_state)
    if initial_state is not None:
        return gated_delta_rule_reference(q, k, v, g, beta, cu_seqlens, initial_state)
    zeros = g.new_zeros(cu_seqlens.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2])
    return gated_delta_rule_reference(q, k, v, g, beta, cu_seqlens, zeros)[0], None
