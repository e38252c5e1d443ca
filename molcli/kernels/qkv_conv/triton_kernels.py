"""Triton kernels: a program computes up to 128 rows of one block, for one head of q, k or v.

Rows of a block are neighbours. So a program reads the block's filters once, and finds a row's
earlier inputs in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molcli.kernels.qkv_conv.reference import EPS
from molcli.kernels.segments import chunk_table

WIDTH = 4
ROWS, TILE = 128, 32  # rows of a program, and rows that it computes at a time


@triton.jit
def _rows_of_program(table, offsets, ROWS: tl.constexpr):
    """The program's block, and its first and end row; no rows for an unused line of the table."""
    line = tl.program_id(0)
    block = tl.load(table + line * 2)
    begin = tl.load(offsets + block - 1, mask=block > 0, other=0).to(tl.int64)
    end = tl.load(offsets + block).to(tl.int64)
    first = begin + tl.load(table + line * 2 + 1) * ROWS
    return block, first, tl.minimum(first + ROWS, end)


@triton.jit
def _taps(weight, channel, known):
    """A filter's weights in float32, the one of the row itself first. In memory it is the last."""
    taps = weight + channel * 4
    w0 = tl.load(taps + 3, mask=known, other=0.0).to(tl.float32)
    w1 = tl.load(taps + 2, mask=known, other=0.0).to(tl.float32)
    w2 = tl.load(taps + 1, mask=known, other=0.0).to(tl.float32)
    w3 = tl.load(taps, mask=known, other=0.0).to(tl.float32)
    return w0, w1, w2, w3


@triton.jit
def _filtered(
    x, stride, column, known, row, real, index, w0, w1, w2, w3, state, start, CHANNELS: tl.constexpr
):
    """(TILE, D) float32: the causal filter of each row; w0 is the weight of the row itself."""
    acc = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for back in tl.static_range(4):
        mask = (real & (index >= back))[:, None] & known[None, :]
        earlier = tl.load(
            x + (row - back)[:, None] * stride + column[None, :], mask=mask, other=0.0
        )
        if state is not None:
            before = (real & (index < back))[:, None] & known[None, :]
            place = (start * CHANNELS)[:, None] + column[None, :]
            held = tl.load(state + place * 3 + (3 + index - back)[:, None], mask=before, other=0.0)
            earlier = earlier.to(tl.float32) + held.to(tl.float32)
        weight = w0
        if back == 1:
            weight = w1
        if back == 2:
            weight = w2
        if back == 3:
            weight = w3
        acc += earlier.to(tl.float32) * weight[None, :]
    return acc


@triton.jit
def _forward_kernel(
    x, q_conv, k_conv, v_conv, index, table, offsets, starts, state, q, k, v, stride,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    block, first, end = _rows_of_program(table, offsets, ROWS)
    if first >= end:
        return
    part, head = tl.program_id(1) // H, tl.program_id(1) % H
    weight, out = q_conv, q
    if part == 1:
        weight, out = k_conv, k
    if part == 2:
        weight, out = v_conv, v
    d = tl.arange(0, BLOCK_D)
    known = d < D
    own = head * D + d
    w0, w1, w2, w3 = _taps(weight, block * (H * D) + own, known)
    for shift in range(0, ROWS, TILE):
        row = first + shift + tl.arange(0, TILE)
        real = row < end
        place = tl.load(index + row, mask=real, other=0)
        start = place
        if state is not None:
            start = tl.load(starts + row, mask=real, other=0)
        y = _filtered(
            x, stride, part * (H * D) + own, known, row, real, place, w0, w1, w2, w3, state, start,
            3 * H * D,
        )  # fmt: skip
        y = y * tl.sigmoid(y)
        if part < 2:
            y = y / tl.maximum(tl.sqrt(tl.sum(y * y, 1)), EPS)[:, None]
        mask = real[:, None] & known[None, :]
        tl.store(out + row[:, None] * (H * D) + own[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    x, q_conv, k_conv, v_conv, index, table, offsets, dq, dk, dv, dy, d_weight, stride,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Gradients of the filters' outputs, and partial sums of the filters' gradients."""
    block, first, end = _rows_of_program(table, offsets, ROWS)
    if first >= end:
        return
    part, head = tl.program_id(1) // H, tl.program_id(1) % H
    weight, grad = q_conv, dq
    if part == 1:
        weight, grad = k_conv, dk
    if part == 2:
        weight, grad = v_conv, dv
    d = tl.arange(0, BLOCK_D)
    known = d < D
    own = head * D + d
    column = part * (H * D) + own
    w0, w1, w2, w3 = _taps(weight, block * (H * D) + own, known)
    s0 = tl.zeros((BLOCK_D,), tl.float32)
    s1 = tl.zeros((BLOCK_D,), tl.float32)
    s2 = tl.zeros((BLOCK_D,), tl.float32)
    s3 = tl.zeros((BLOCK_D,), tl.float32)
    for shift in range(0, ROWS, TILE):
        row = first + shift + tl.arange(0, TILE)
        real = row < end
        mask = real[:, None] & known[None, :]
        place = tl.load(index + row, mask=real, other=0)
        y = _filtered(
            x, stride, column, known, row, real, place, w0, w1, w2, w3, None, place, 3 * H * D
        )
        gate = tl.sigmoid(y)
        g = tl.load(grad + row[:, None] * (H * D) + own[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        if part < 2:
            s = y * gate
            length = tl.sqrt(tl.sum(s * s, 1))
            scale = 1.0 / tl.maximum(length, EPS)
            along = tl.where(length > EPS, tl.sum(g * s, 1) * scale * scale, 0.0)
            g = (g - s * along[:, None]) * scale[:, None]
        g = g * gate * (1.0 + y * (1.0 - gate))
        tl.store(
            dy + row[:, None] * (3 * H * D) + column[None, :], g.to(dy.dtype.element_ty), mask=mask
        )
        for back in tl.static_range(4):
            inside = (real & (place >= back))[:, None] & known[None, :]
            at = (row - back)[:, None] * stride + column[None, :]
            share = tl.sum(g * tl.load(x + at, mask=inside, other=0.0).to(tl.float32), 0)
            if back == 0:
                s0 += share
            if back == 1:
                s1 += share
            if back == 2:
                s2 += share
            if back == 3:
                s3 += share
    out = d_weight + (tl.program_id(0).to(tl.int64) * (3 * H * D) + column) * 4
    tl.store(out + 3, s0, mask=known)
    tl.store(out + 2, s1, mask=known)
    tl.store(out + 1, s2, mask=known)
    tl.store(out, s3, mask=known)


@triton.jit
def _input_gradient_kernel(
    dy, q_conv, k_conv, v_conv, index, table, offsets, dx, num_rows,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs. A row and the next three of its segment read its input."""
    block, first, end = _rows_of_program(table, offsets, ROWS)
    if first >= end:
        return
    part, head = tl.program_id(1) // H, tl.program_id(1) % H
    weight = q_conv
    if part == 1:
        weight = k_conv
    if part == 2:
        weight = v_conv
    d = tl.arange(0, BLOCK_D)
    known = d < D
    own = head * D + d
    column = part * (H * D) + own
    taps = weight + (block * (H * D) + own) * 4
    for shift in range(0, ROWS, TILE):
        row = first + shift + tl.arange(0, TILE)
        acc = tl.zeros((TILE, BLOCK_D), tl.float32)
        for ahead in tl.static_range(4):
            later = row + ahead
            place = tl.load(index + later, mask=later < num_rows, other=-1)
            # A later row of another segment has an index there that is less than `ahead`.
            inside = ((row < end) & (place >= ahead))[:, None] & known[None, :]
            at = later[:, None] * (3 * H * D) + column[None, :]
            w = tl.load(taps + 3 - ahead, mask=known, other=0.0).to(tl.float32)
            acc += tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * w[None, :]
        at = row[:, None] * (3 * H * D) + column[None, :]
        mask = (row < end)[:, None] & known[None, :]
        tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    index: Tensor,
    offsets: Tensor,
    starts: Tensor,
    state: Tensor | None,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v, as `qkv_conv`. index, offsets: of its rows; starts: its `segment`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, heads = x.shape[0], x.shape[1] // (3 * head_dim)
    q, k, v = (x.new_empty(rows, heads, head_dim) for _ in range(3))
    table = _table(offsets, rows)
    _forward_kernel[(table.shape[0], 3 * heads)](
        x, *(w.contiguous() for w in weights), index, table, offsets,
        starts, None if state is None else state.contiguous(), q, k, v, x.stride(0),
        H=heads, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
        ROWS=ROWS, TILE=TILE, EPS=EPS,
    )  # fmt: skip
    return q, k, v


def backward(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    index: Tensor,
    offsets: Tensor,
    head_dim: int,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and of the three weights, in their dtypes. gradients: those of q, k and v."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, heads = x.shape[0], x.shape[1] // (3 * head_dim)
    weights = tuple(w.contiguous() for w in weights)  # type: ignore[assignment]
    table, shape = _table(offsets, rows), dict(H=heads, D=head_dim, ROWS=ROWS, TILE=TILE)
    shape["BLOCK_D"] = triton.next_power_of_2(head_dim)
    grid = (table.shape[0], 3 * heads)
    dy, dx = (x.new_empty(rows, x.shape[1]) for _ in range(2))
    partial = x.new_zeros(table.shape[0], x.shape[1] * WIDTH, dtype=torch.float32)
    _backward_kernel[grid](
        x, *weights, index, table, offsets, *(g.contiguous() for g in gradients), dy, partial,
        x.stride(0), **shape, EPS=EPS,
    )  # fmt: skip
    _input_gradient_kernel[grid](dy, *weights, index, table, offsets, dx, rows, **shape)
    # A product with a one-hot matrix adds the partial sums in the same order in every run.
    blocks = torch.arange(offsets.shape[0], device=x.device)
    total = (table[:, 0] == blocks[:, None]).float() @ partial
    split = total.view(offsets.shape[0], 3, -1, WIDTH).unbind(1)
    dq, dk, dv = (
        g.to(w.dtype, copy=True).contiguous() for g, w in zip(split, weights, strict=True)
    )
    return dx, dq, dk, dv


def _table(offsets: Tensor, rows: int) -> Tensor:
    bounds = torch.cat([offsets.new_zeros(1), offsets]).long()
    return chunk_table(bounds, rows, ROWS)
