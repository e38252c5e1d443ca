"""Triton kernels for short segments: a tile holds rows of as many neighbouring segments as fit.

Rows of a segment are neighbours. So a query sees one range of rows, from its segment's start to
itself, and a key is seen by one range, from itself to its segment's end. A program takes a tile of
rows of one head and loops over the union of their ranges. Inside a program, rows count from the
tile's first one. Products are in the inputs' dtype with float32 sums; the softmax is in float32,
base 2. Every sum has a fixed order, without atomics, hence the same bits in every run.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# TILE: rows of a program, the fewest that Hopper's matrix units multiply in one instruction.
# STEP: rows of one iteration of its loop. 64 would need twice the registers, so that a
# multiprocessor would hold half as many programs.
TILE, STEP = 64, 32
# One binary for any number of heads, in which parent and blocks differ.
_HEADS = ["H", "GROUP"]
LOWEST = tl.constexpr(-1e30)  # below every score but finite, so that LOWEST - LOWEST is 0


@triton.jit
def _tile(x, first, row_stride, head, head_stride, row, d):
    """Pointers to (rows, D) of one head; `row` counts from `first`."""
    return x + first * row_stride + head * head_stride + row[:, None] * row_stride + d[None, :]


@triton.jit
def _starts(segments, cu_seqlens, first, m, count):
    """Where the segments of a tile's rows start, counted from the tile's first row."""
    segment = tl.load(segments + first + m, mask=m < count, other=0)
    start = tl.load(cu_seqlens + segment).to(tl.int64) - first
    return tl.where(m < count, start, 0).to(tl.int32)


@triton.jit(do_not_specialize=_HEADS)
def _forward_kernel(
    q, k, v, out, lse, segments, cu_seqlens, num_rows,
    q_row, q_head, k_row, k_head, v_row, v_head, scale,
    H, GROUP, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """scale: of the scores, in base 2. lse: (M, H), base-2 logarithm of each row's softmax sum."""
    head = tl.program_id(0) % H
    first = (tl.program_id(0) // H).to(tl.int64) * BLOCK_M
    count = tl.minimum(num_rows - first, BLOCK_M).to(tl.int32)
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    real = (m < count)[:, None]
    start = _starts(segments, cu_seqlens, first, m, count)
    query = tl.load(_tile(q, first, q_row, head, q_head, m, d), mask=real, other=0.0)
    keys = _tile(k, first, k_row, head // GROUP, k_head, n, d)
    values = _tile(v, first, v_row, head // GROUP, v_head, n, d)
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for shift in range(tl.min(start, 0), BLOCK_M, BLOCK_N):
        column = shift + n
        inside = (column < count)[:, None]
        key = tl.load(keys + shift * k_row, mask=inside, other=0.0)
        value = tl.load(values + shift * v_row, mask=inside, other=0.0)
        seen = (column[None, :] >= start[:, None]) & (column[None, :] <= m[:, None])
        score = tl.where(seen, tl.dot(query, tl.trans(key)) * scale, -float("inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        keep = tl.exp2(peak - higher)
        mass = mass * keep + tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc * keep[:, None])
        peak = higher
    read = (acc / mass[:, None]).to(out.dtype.element_ty)
    tl.store(_tile(out, first, H * D, head, D, m, d), read, mask=real)
    tl.store(lse + (first + m) * H + head, peak + tl.log2(mass), mask=m < count)


@triton.jit(do_not_specialize=_HEADS)
def _query_gradient_kernel(
    q, k, v, out, d_out, lse, delta, dq, segments, cu_seqlens, num_rows,
    q_row, q_head, k_row, k_head, v_row, v_head, scale, natural,
    H, GROUP, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """natural: the scores' scale in base e. Writes delta as well, (M, H): the dot product of each
    row's output and its gradient."""
    head = tl.program_id(0) % H
    first = (tl.program_id(0) // H).to(tl.int64) * BLOCK_M
    count = tl.minimum(num_rows - first, BLOCK_M).to(tl.int32)
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    real = (m < count)[:, None]
    start = _starts(segments, cu_seqlens, first, m, count)
    query = tl.load(_tile(q, first, q_row, head, q_head, m, d), mask=real, other=0.0)
    grad = tl.load(_tile(d_out, first, H * D, head, D, m, d), mask=real, other=0.0)
    read = tl.load(_tile(out, first, H * D, head, D, m, d), mask=real, other=0.0)
    level = tl.load(lse + (first + m) * H + head, mask=m < count, other=0.0)
    along = tl.sum(read.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta + (first + m) * H + head, along, mask=m < count)
    keys = _tile(k, first, k_row, head // GROUP, k_head, n, d)
    values = _tile(v, first, v_row, head // GROUP, v_head, n, d)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for shift in range(tl.min(start, 0), BLOCK_M, BLOCK_N):
        column = shift + n
        inside = (column < count)[:, None]
        key = tl.load(keys + shift * k_row, mask=inside, other=0.0)
        value = tl.load(values + shift * v_row, mask=inside, other=0.0)
        seen = (column[None, :] >= start[:, None]) & (column[None, :] <= m[:, None])
        score = tl.where(seen, tl.dot(query, tl.trans(key)) * scale, -float("inf"))
        weight = tl.exp2(score - level[:, None])
        d_score = weight * (tl.dot(grad, tl.trans(value)) - along[:, None])
        acc = tl.dot(d_score.to(key.dtype), key, acc)
    own = _tile(dq, first, H * D, head, D, m, d)
    tl.store(own, (acc * natural).to(dq.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=_HEADS)
def _key_gradients_kernel(
    q, k, v, d_out, lse, delta, dk, dv, segments, cu_seqlens, num_rows,
    q_row, q_head, k_row, k_head, v_row, v_head, scale, natural,
    H, GROUP, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program sums over all query heads of its key-value head. Scores are keys × queries."""
    kv = tl.program_id(0) % (H // GROUP)
    first = (tl.program_id(0) // (H // GROUP)).to(tl.int64) * BLOCK_N
    count = tl.minimum(num_rows - first, BLOCK_N).to(tl.int32)
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    real = (n < count)[:, None]
    segment = tl.load(segments + first + n, mask=n < count, other=0)
    end = tl.load(cu_seqlens + segment + 1).to(tl.int64) - first
    end = tl.where(n < count, end, 0).to(tl.int32)
    key = tl.load(_tile(k, first, k_row, kv, k_head, n, d), mask=real, other=0.0)
    value = tl.load(_tile(v, first, v_row, kv, v_head, n, d), mask=real, other=0.0)
    queries = _tile(q, first, q_row, kv * GROUP, q_head, m, d)
    grads = _tile(d_out, first, H * D, kv * GROUP, D, m, d)
    sums = (first + m) * H + kv * GROUP
    k_acc = tl.zeros((BLOCK_N, D), tl.float32)
    v_acc = tl.zeros((BLOCK_N, D), tl.float32)
    stretch = tl.max(end, 0)
    steps = tl.cdiv(stretch, BLOCK_M)
    for step in range(steps * GROUP):  # one loop over heads and rows, to be pipelined as a whole
        head = step // steps
        shift = (step - head * steps) * BLOCK_M
        row = shift + m
        inside = row < stretch
        query = tl.load(queries + shift * q_row + head * q_head, mask=inside[:, None], other=0.0)
        grad = tl.load(grads + (shift * H + head) * D, mask=inside[:, None], other=0.0)
        level = tl.load(lse + sums + (shift * H + head), mask=inside, other=0.0)
        along = tl.load(delta + sums + (shift * H + head), mask=inside, other=0.0)
        seen = (row[None, :] >= n[:, None]) & (row[None, :] < end[:, None])
        score = tl.where(seen, tl.dot(key, tl.trans(query)) * scale, -float("inf"))
        weight = tl.exp2(score - level[None, :])
        v_acc = tl.dot(weight.to(grad.dtype), grad, v_acc)
        d_score = weight * (tl.dot(value, tl.trans(grad)) - along[None, :])
        k_acc = tl.dot(d_score.to(query.dtype), query, k_acc)
    k_own = _tile(dk, first, H // GROUP * D, kv, D, n, d)
    v_own = _tile(dv, first, H // GROUP * D, kv, D, n, d)
    tl.store(k_own, (k_acc * natural).to(dk.dtype.element_ty), mask=real)
    tl.store(v_own, v_acc.to(dv.dtype.element_ty), mask=real)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    cu_seqlens: Tensor,
    tile: int = TILE,
    step: int = STEP,
) -> tuple[Tensor, Tensor]:
    """Attend inside segments.

    Args:
        q, k, v: as for `segment_attention`; d is a power of two, at least 16.
        segments: (M,) int64, each row's segment; ascending.
        cu_seqlens: (num_segments + 1,) int32, bounds of the segments.
        tile, step: as TILE and STEP, powers of two, at least 16.

    Returns:
        The output, (M, H, d), and the base-2 logarithm of each row's softmax sum, (M, H) float32.
    """
    q, k, v = (_with_dense_channels(x) for x in (q, k, v))
    rows, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(rows, heads, dtype=torch.float32)
    _forward_kernel[(triton.cdiv(rows, tile) * heads,)](
        q, k, v, out, lse, segments, cu_seqlens, rows, *_strides(q, k, v), _scales(q)[0],
        **_shape(q, k), BLOCK_M=tile, BLOCK_N=step,
    )  # fmt: skip
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    cu_seqlens: Tensor,
    d_out: Tensor,
    tile: int = TILE,
    step: int = STEP,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. out, lse: as `forward` returned them. Others: as for `forward`."""
    q, k, v = (_with_dense_channels(x) for x in (q, k, v))
    d_out = d_out.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    tiles = triton.cdiv(q.shape[0], tile)
    shared = (segments, cu_seqlens, q.shape[0], *_strides(q, k, v), *_scales(q))
    shape = _shape(q, k)
    _query_gradient_kernel[(tiles * q.shape[1],)](
        q, k, v, out, d_out, lse, delta, dq, *shared, **shape, BLOCK_M=tile, BLOCK_N=step
    )
    _key_gradients_kernel[(tiles * k.shape[1],)](
        q, k, v, d_out, lse, delta, dk, dv, *shared, **shape, BLOCK_M=step, BLOCK_N=tile
    )
    return dq, dk, dv


def _with_dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _scales(q: Tensor) -> tuple[float, float]:
    """The scores' scale in base 2 and in base e."""
    scale = q.shape[2] ** -0.5
    return scale * math.log2(math.e), scale


def _shape(q: Tensor, k: Tensor) -> dict[str, int]:
    _, heads, dim = q.shape
    return dict(H=heads, GROUP=heads // k.shape[1], D=dim, num_warps=4, num_stages=2)
