"""Triton kernels of the router's logits.

Products run on the CUDA cores, because the matrix units would round float32. A tile is (rows,
blocks, channels). Neighbouring threads hold neighbouring channels: sums over rows and over blocks
stay inside a thread, and so do sums over channels until the last one. Every sum has a fixed order,
without atomics, hence the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molcli.kernels.router_logits.reference import EPS

CHANNELS = 128  # of a tile: four of them, 16 bytes, for each thread of a warp
SUMMED = tl.constexpr(4)  # neighbouring channels, which one thread holds
# A program of the backward pass sums the weight's gradient over this many rows, or over more rows
# where there would be too many such partial sums.
ROWS, MAX_PARTS = 128, 512


@triton.jit
def _forward_kernel(
    x, weight, logits, scales, num_rows, stride,
    D: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    row, block = m < num_rows, r < R
    h_at = x + m[:, None, None] * stride + d[None, None, :]
    w_at = weight + r[None, :, None] * D + d[None, None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_R, BLOCK_D // SUMMED), tl.float32)
    squares = tl.zeros((BLOCK_M, 1, BLOCK_D // SUMMED), tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=3):
        known = (start + d < D)[None, None, :]
        h = tl.load(h_at + start, mask=row[:, None, None] & known, other=0.0).to(tl.float32)
        w = tl.load(w_at + start, mask=block[None, :, None] & known, other=0.0).to(tl.float32)
        acc += tl.sum(tl.reshape(h * w, (BLOCK_M, BLOCK_R, BLOCK_D // SUMMED, SUMMED)), 3)
        squares += tl.sum(tl.reshape(h * h, (BLOCK_M, 1, BLOCK_D // SUMMED, SUMMED)), 3)
    scale = tl.rsqrt(tl.sum(squares, 2) / D + EPS)
    mask = row[:, None] & block[None, :]
    tl.store(logits + m[:, None] * R + r[None, :], tl.sum(acc, 2) * scale, mask=mask)
    tl.store(scales + m[:, None], scale, mask=row[:, None])


@triton.jit
def _backward_kernel(
    x, weight, logits, scales, d_logits, dx, shares, num_rows, stride,
    D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With u = x / rms(x) and g the logits' gradient: dx = (g W - u (g . logits) / d) / rms(x), and
    the partial sum g^T u of the program's rows."""
    part = tl.program_id(0).to(tl.int64)
    r, d = tl.arange(0, BLOCK_R), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    block, known = r < R, (d < D)[None, None, :]
    own = r[None, :, None] * D + d[None, None, :]
    real = block[None, :, None] & known
    w = tl.load(weight + own, mask=real, other=0.0).to(tl.float32)
    acc = tl.zeros((1, BLOCK_R, BLOCK_D), tl.float32)
    for start in tl.range(0, ROWS, BLOCK_M, num_stages=3):
        m = part * ROWS + start + tl.arange(0, BLOCK_M)
        row = m < num_rows
        both = row[:, None] & block[None, :]
        score = m[:, None] * R + r[None, :]
        scale = tl.load(scales + m, mask=row, other=0.0)
        grad = tl.load(d_logits + score, mask=both, other=0.0)
        along = tl.sum(grad * tl.load(logits + score, mask=both, other=0.0), 1) / D
        mask, channel = row[:, None, None] & known, d[None, None, :]
        unit = tl.load(x + m[:, None, None] * stride + channel, mask=mask, other=0.0)
        unit = unit * scale[:, None, None]
        across = tl.sum(grad[:, :, None] * w, 1, keep_dims=True)
        across = (across - unit * along[:, None, None]) * scale[:, None, None]
        tl.store(dx + m[:, None, None] * D + channel, across, mask=mask)
        acc += tl.sum(grad[:, :, None] * unit, 0, keep_dims=True)
    tl.store(shares + part * (R * D) + own, acc, mask=real)


def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits, (n, R), and 1 / rms(x), (n,), both float32. x: (n, d), weight: (R, d)."""
    x, weight = _with_dense_channels(x), weight.contiguous()
    rows, width, blocks = *x.shape, weight.shape[0]
    logits = x.new_empty(rows, blocks, dtype=torch.float32)
    scales = x.new_empty(rows, dtype=torch.float32)
    padded = triton.next_power_of_2(blocks)
    # At most 64 sums per thread: they fit into its registers.
    tile, warps = (32 if padded < 16 else 16), (4 if padded <= 16 else 8)
    _forward_kernel[(triton.cdiv(rows, tile),)](
        x, weight, logits, scales, rows, x.stride(0), D=width, R=blocks, EPS=EPS,
        BLOCK_M=tile, BLOCK_R=padded, BLOCK_D=CHANNELS, num_warps=warps,
    )  # fmt: skip
    return logits, scales


def backward(
    x: Tensor, weight: Tensor, logits: Tensor, scales: Tensor, d_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, in their dtypes. logits, scales: as `forward` returned them."""
    # In half precision a thread would load eight channels, and sums would cross threads.
    exact, weight = _with_dense_channels(x.float()), weight.contiguous()
    rows, width, blocks = *x.shape, weight.shape[0]
    part_rows = max(min(rows, ROWS), triton.cdiv(rows, MAX_PARTS), 1)
    part_rows = triton.next_power_of_2(part_rows)  # so that few lengths compile a new binary
    parts = triton.cdiv(rows, part_rows)
    dx = exact.new_empty(x.shape)
    partial = exact.new_empty(parts, blocks, width)
    padded = triton.next_power_of_2(blocks)
    # The same limit of 64 here, beside as many weights.
    tile, channels = (4, CHANNELS) if padded <= 16 else (2, CHANNELS // 2)
    _backward_kernel[(parts, triton.cdiv(width, channels))](
        exact, weight, logits, scales, d_logits.contiguous(), dx, partial, rows, exact.stride(0),
        D=width, R=blocks, ROWS=part_rows, BLOCK_M=tile, BLOCK_R=padded, BLOCK_D=channels,
        num_warps=1,
    )  # fmt: skip
    return dx.to(x.dtype), partial.sum(0).to(weight.dtype)


def _with_dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
