"""The gated delta rule token by token and in chunks, in float32 or higher."""

import torch
from torch import Tensor

from molcli.kernels.segments import longest_segment, pad_segments, unpad_segments

CHUNK = 64


def recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule by its definition, in a loop over time. For tests.

    S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T,  o_t = S_t q_t d_k^-1/2.

    Args:
        q, k: (N, T, H, d_k), queries and keys of unit length.
        v: (N, T, H, d_v), values.
        g: (N, T, H), logarithm of the decay a_t.
        beta: (N, T, H), write strength b_t.
        state: (N, H, d_k, d_v), the state before the first token.

    Returns:
        Outputs, (N, T, H, d_v), and the state after the last token.

    Source: arXiv 2412.06464, equation 10.
    """
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        error = v[:, t] - torch.einsum("nhk,nhkv->nhv", k[:, t], state)
        state = state + torch.einsum("nhk,nhv->nhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("nhk,nhkv->nhv", q[:, t], state) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1), state


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule over every segment, in chunks of at most 64 tokens.

    Segments are padded to one length. Padding has beta 0 and g 0, which leave the state unchanged.

    Args:
        q, k, v, g, beta, cu_seqlens: as for `gated_delta_rule`.
        initial_state: (num_segments, H, d_k, d_v), the state before each segment.

    Returns:
        Outputs, (M, H, d_v) in the dtype of `v`, and the state after each segment, in float32 or
        higher.
    """
    exact = torch.promote_types(v.dtype, torch.float32)
    length = longest_segment(cu_seqlens)
    chunk = min(CHUNK, length)
    length = -(-length // chunk) * chunk
    rows = q.shape[0]
    q, k, padded_v, g, beta = (
        pad_segments(x.to(exact), cu_seqlens, length) for x in (q, k, v, g, beta)
    )
    with torch.autocast(v.device.type, enabled=False):
        out, state = _chunked(q, k, padded_v, g, beta, initial_state.to(exact), chunk)
    return unpad_segments(out, cu_seqlens, rows).to(v.dtype), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Chunkwise form (arXiv 2412.06464, section 3.3). q, k, v: (N, L, H, d), L a multiple of chunk.

    Inside a chunk the rank-one updates are solved together. With c the running sum of g and
    A[i, j] = b_i (k_i . k_j) exp(c_i - c_j) for j < i, the values that are written to the state are
    (I + A)^-1 applied to b (v - exp(c) k S).
    """
    n, length, heads, _ = q.shape

    def chunks(x: Tensor) -> Tensor:  # (N, L, H, ...) -> (N, H, L / chunk, chunk, ...)
        return x.view(n, length // chunk, chunk, heads, *x.shape[3:]).movedim(3, 1)

    q, k, v, g, beta = (chunks(x) for x in (q * q.shape[-1] ** -0.5, k, v, g, beta))
    decay = g.cumsum(-1)  # (N, H, chunks, chunk)
    below = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    # Mask before exp: above the diagonal the difference is positive and may overflow.
    ratio = (decay[..., :, None] - decay[..., None, :]).masked_fill(~below, -torch.inf).exp()
    a = (beta[..., None] * (k @ k.mT) * ratio).tril(-1)
    right = torch.cat([beta[..., None] * v, (beta * decay.exp())[..., None] * k], dim=-1)
    solved = torch.linalg.solve_triangular(a, right, upper=False, unitriangular=True)
    values, keys = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = (q @ k.mT) * ratio
    last = decay[..., -1:]
    outputs = []
    for c in range(length // chunk):
        written = values[:, :, c] - keys[:, :, c] @ state
        read = (q[:, :, c] * decay[:, :, c, :, None].exp()) @ state
        outputs.append(read + scores[:, :, c] @ written)
        carried = k[:, :, c] * (last[:, :, c] - decay[:, :, c])[..., None].exp()
        state = state * last[:, :, c, :, None].exp() + carried.mT @ written
    out = torch.stack(outputs, dim=2)  # (N, H, chunks, chunk, d_v)
    return out.movedim(1, 3).reshape(n, length, heads, -1), state
