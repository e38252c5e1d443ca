"""Triton kernel: one program runs the whole step for one head of one row, states in place."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _read(projected, weight, conv_state, channel, mask):
    """Convolution and SiLU of every channel, and its three latest inputs, the new one last."""
    place, taps = conv_state + channel * 3, weight + channel * 4
    x0 = tl.load(place, mask=mask, other=0.0)
    x1 = tl.load(place + 1, mask=mask, other=0.0)
    x2 = tl.load(place + 2, mask=mask, other=0.0)
    x3 = tl.load(projected + channel, mask=mask, other=0.0)
    y = x0.to(tl.float32) * tl.load(taps, mask=mask, other=0.0).to(tl.float32)
    y += x1.to(tl.float32) * tl.load(taps + 1, mask=mask, other=0.0).to(tl.float32)
    y += x2.to(tl.float32) * tl.load(taps + 2, mask=mask, other=0.0).to(tl.float32)
    y += x3.to(tl.float32) * tl.load(taps + 3, mask=mask, other=0.0).to(tl.float32)
    return y / (1 + tl.exp(-y)), x1, x2, x3


@triton.jit
def _move_on(conv_state, channel, mask, x1, x2, x3):
    place = conv_state + channel * 3
    tl.store(place, x1, mask=mask)
    tl.store(place + 1, x2, mask=mask)
    tl.store(place + 2, x3.to(conv_state.dtype.element_ty), mask=mask)


@triton.jit
def _step_kernel(
    projected, q_conv, k_conv, v_conv, a_log, dt_bias, o_norm, conv_state, state, blocks, active,
    out, slots, num_blocks, eps,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    INNER: tl.constexpr = H * D
    sequence = row // slots
    block = tl.load(blocks + row)
    live = tl.load(active + sequence) != 0
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    channel = head * D + d
    projected += row.to(tl.int64) * (4 * INNER + 2 * H)
    place = sequence * num_blocks + block
    conv_state += place * (9 * INNER)
    taps = block * (INNER * 4)
    k_state, v_state = conv_state + 3 * INNER, conv_state + 6 * INNER
    q, q1, q2, q3 = _read(projected, q_conv + taps, conv_state, channel, mask)
    k, k1, k2, k3 = _read(projected + INNER, k_conv + taps, k_state, channel, mask)
    v, v1, v2, v3 = _read(projected + 2 * INNER, v_conv + taps, v_state, channel, mask)
    q = q / tl.maximum(tl.sqrt(tl.sum(q * q, 0)), 1e-6)
    k = k / tl.maximum(tl.sqrt(tl.sum(k * k, 0)), 1e-6)
    a = tl.load(projected + 4 * INNER + head).to(tl.float32)
    b = tl.load(projected + 4 * INNER + H + head).to(tl.float32)
    a += tl.load(dt_bias + block * H + head).to(tl.float32)
    soft = tl.where(a > 20.0, a, tl.log(1 + tl.exp(tl.minimum(a, 20.0))))
    decay = tl.exp(-tl.exp(tl.load(a_log + block * H + head).to(tl.float32)) * soft)
    beta = 1 / (1 + tl.exp(-b))
    square = (place * H + head) * (D * D) + d[:, None] * D + d[None, :]
    both = mask[:, None] & mask[None, :]
    memory = tl.load(state + square, mask=both, other=0.0) * decay
    error = v - tl.sum(k[:, None] * memory, 0)
    memory += k[:, None] * (beta * error)[None, :]
    read = tl.sum(q[:, None] * memory, 0) * (D**-0.5)
    read = read * tl.rsqrt(tl.sum(read * read, 0) / D + eps)
    gate = tl.load(projected + 3 * INNER + channel, mask=mask, other=0.0).to(tl.float32)
    read *= tl.load(o_norm + block * D + d, mask=mask, other=0.0).to(tl.float32)
    read *= gate / (1 + tl.exp(-gate))
    tl.store(out + row * INNER + channel, read.to(out.dtype.element_ty), mask=mask)
    # Several threads may hold one value: wait until all have read, before the first one writes.
    tl.debug_barrier()
    tl.store(state + square, memory, mask=tl.where(live, both, False))
    kept = tl.where(live, mask, False)
    _move_on(conv_state, channel, kept, q1, q2, q3)
    _move_on(k_state, channel, kept, k1, k2, k3)
    _move_on(v_state, channel, kept, v1, v2, v3)


def launch(
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
    """Run the step. Arguments and returns are those of `gated_delta_step`."""
    rows, (batch, num_blocks, heads, dim) = blocks.shape[0], state.shape[:4]
    out = projected.new_empty(rows, heads * dim)
    block_d = triton.next_power_of_2(dim)
    _step_kernel[(rows, heads)](
        projected, *convs, a_log, dt_bias, o_norm, conv_state, state, blocks, active,
        out, rows // batch, num_blocks, eps,
        H=heads, D=dim, BLOCK_D=block_d, num_warps=8 if block_d > 64 else 4,
    )  # fmt: skip
    return out
