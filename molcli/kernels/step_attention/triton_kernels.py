"""Triton kernels: rotate and append; attend to pieces of the cache; merge the pieces.

With few rows, a program has a query head and a piece of the cache, so that a GPU is filled. With
many, it has all query heads of a key-value head and the whole cache, which is then read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 512  # enough for a few on each of a GPU's multiprocessors
_PIECE = 64  # entries of the cache that a program reads at a time
_CHANNELS = 1024  # that a program rotates at a time, with many rows
_PIECE_BYTES = 16_384  # at most, of their keys: they pass through shared memory


@triton.jit
def _append_kernel(
    projected, q_bias, k_bias, v_bias, q_norm, k_norm, cos, sin, keys, values, owners, filled,
    blocks, active, out, length, slots, eps,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, TURN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, block = row // slots, tl.load(blocks + row)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    is_q, is_k = head < H, (head >= H) & (head < H + KV)
    is_v = (head >= H + KV) & (head < H + 2 * KV)
    real = d < D
    mask = (head < H + 2 * KV) & real
    entry = (token * length + tl.load(filled)) * slots + row % slots
    # Channel d rotates with its partner, which is half of the rotary channels away.
    half: tl.constexpr = TURN // 2
    turning = d < TURN
    partner = tl.where(turning, tl.where(d < half, d + half, d - half), d)
    sign = tl.where(d < half, -1.0, 1.0)
    c = tl.load(cos + token * TURN + d, mask=turning, other=1.0).to(tl.float32)
    s = tl.load(sin + token * TURN + d, mask=turning, other=0.0).to(tl.float32) * sign
    source = projected + row * ((H + 2 * KV) * D) + head * D
    x = tl.load(source + d, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(source + partner, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        q = q_bias + block * (H * D) + head * D
        k = k_bias + block * (KV * D) + (head - H) * D
        v = v_bias + block * (KV * D) + (head - H - KV) * D
        bias = tl.where(is_q, q, tl.where(is_k, k, v))
        x += tl.load(bias + d, mask=mask, other=0.0).to(tl.float32)
        y += tl.load(bias + partner, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1)[:, None] / D + eps)
        norm = tl.where(is_q, q_norm, k_norm) + block * D
        x_scale = scale * tl.load(norm + d, mask=mask, other=0.0).to(tl.float32)
        y_scale = scale * tl.load(norm + partner, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(is_v, x, x * x_scale)
        y = y * y_scale
    turned = x * c + y * s
    tl.store(out + (row * H + head) * D + d, turned.to(out.dtype.element_ty), mask=is_q & real)
    place = entry * (KV * D) + (head - H) * D + d
    tl.store(keys + place, turned.to(keys.dtype.element_ty), mask=is_k & real)
    tl.store(values + (place - KV * D), x.to(values.dtype.element_ty), mask=is_v & real)
    if tl.program_id(1) == 0:
        live = tl.load(active + token) != 0
        tl.store(owners + entry, tl.where(live, block, -1).to(owners.dtype.element_ty))


@triton.jit
def _attend_kernel(
    q, keys, values, owners, filled, blocks, partial, best, total, length, slots, scale,
    window, H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_D: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    program, split = tl.program_id(0), tl.program_id(1)
    row, head = program // H, program % H
    kv = head // (H // KV)
    block = tl.load(blocks + row)
    first = (row // slots).to(tl.int64) * length * slots
    entries = (tl.load(filled) + 1) * slots
    oldest = 0  # the first entry inside the window
    if window > 0:
        oldest = tl.maximum(entries - window * slots, 0)
    share = tl.cdiv(tl.cdiv(entries - oldest, SPLITS), PIECE) * PIECE
    begin = oldest + split * share
    end = tl.minimum(begin + share, entries)
    d = tl.arange(0, BLOCK_D)
    real = d < D
    query = tl.load(q + program * D + d, mask=real, other=0.0).to(tl.float32) * scale
    peak = -float("inf")
    mass = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    start = begin
    while start < end:
        index = start + tl.arange(0, PIECE)
        owner = tl.load(owners + first + index, mask=index < end, other=-1)
        seen = owner.to(tl.int64) == block
        wanted = seen
        if EVERY:  # start loading before the entries' blocks are known
            wanted = index < end
        mask = wanted[:, None] & real[None, :]
        place = ((first + index) * KV + kv)[:, None] * D + d[None, :]
        key = tl.load(keys + place, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(key * query[None, :], 1), -float("inf"))
        higher = tl.maximum(peak, tl.max(score, 0))
        level = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp(score - level)
        keep = tl.exp(peak - level)
        mass = mass * keep + tl.sum(weight, 0)
        acc = acc * keep + tl.sum(weight[:, None] * value, 0)
        peak = higher
        start += PIECE
    place = program * SPLITS + split
    tl.store(partial + place * D + d, acc, mask=real)
    tl.store(best + place, peak)
    tl.store(total + place, mass)


@triton.jit
def _merge_kernel(
    partial, best, total, out,
    D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    peak = tl.load(best + program * SPLITS + split)
    level = tl.max(peak, 0)
    level = tl.where(level == -float("inf"), 0.0, level)
    factor = tl.exp(peak - level)
    mass = tl.sum(tl.load(total + program * SPLITS + split) * factor, 0)
    place = (program * SPLITS + split)[:, None] * D + d[None, :]
    piece = tl.load(partial + place, mask=(d < D)[None, :], other=0.0)
    read = tl.sum(piece * factor[:, None], 0) / tl.where(mass > 0, mass, 1.0)
    tl.store(out + program * D + d, read.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _attend_group_kernel(
    q, keys, values, owners, filled, blocks, out, length, slots, scale, window,
    GROUP: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, kv = program // KV, program % KV
    block = tl.load(blocks + row)
    first = (row // slots).to(tl.int64) * length * slots
    time = tl.load(filled)
    # Nothing is read for a sequence that has ended: its new token is padding.
    padding = tl.load(owners + first + time * slots + row % slots) < 0
    end = tl.where(padding, 0, (time + 1) * slots)
    begin = 0  # the first entry inside the window
    if window > 0:
        begin = tl.maximum(end - window * slots, 0)
    head, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    real = d < D
    # Heads are padded to what matrix units multiply.
    place = program.to(tl.int64) * (GROUP * D) + head[:, None] * D + d[None, :]
    mine = (head < GROUP)[:, None] & real[None, :]
    query = tl.load(q + place, mask=mine, other=0.0)
    peak = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for start in range(begin, end, PIECE):
        index = start + tl.arange(0, PIECE)
        owner = tl.load(owners + first + index, mask=index < end, other=-1)
        seen = owner.to(tl.int64) == block
        wanted = seen
        if EVERY:  # start loading before the entries' blocks are known
            wanted = index < end
        mask = wanted[:, None] & real[None, :]
        entry = ((first + index) * KV + kv)[:, None] * D + d[None, :]
        key = tl.load(keys + entry, mask=mask, other=0.0)
        value = tl.load(values + entry, mask=mask, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, -float("inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        level = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp(score - level[:, None])
        keep = tl.exp(peak - level)
        mass = mass * keep + tl.sum(weight, 1)
        more = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        acc = acc * keep[:, None] + more
        peak = higher
    read = acc / tl.where(mass > 0, mass, 1.0)[:, None]
    tl.store(out + place, read.to(out.dtype.element_ty), mask=mine)


def launch_append(
    projected: Tensor,
    biases: list[Tensor],
    norms: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    cache_blocks: Tensor,
    filled: Tensor,
    blocks: Tensor,
    active: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    """Append. Arguments and returns are those of `step_append`."""
    _, length, slots, kv, dim = keys.shape
    rows, total, block_d = blocks.shape[0], num_heads + 2 * kv, triton.next_power_of_2(dim)
    out = projected.new_empty(rows, num_heads, dim)
    heads = 1  # of a program: enough programs, or enough work for each
    if rows >= _PROGRAMS:
        heads = max(1, min(triton.next_power_of_2(total), _CHANNELS // block_d))
    _append_kernel[(rows, triton.cdiv(total, heads))](
        projected, *(biases or [projected] * 3), *(norms or [projected] * 2), cos, sin,
        keys, values, cache_blocks, filled, blocks, active, out, length, slots, eps,
        H=num_heads, KV=kv, D=dim, TURN=cos.shape[-1], HAS_BIAS=bool(biases), HAS_NORM=bool(norms),
        HEADS=heads, BLOCK_D=block_d, num_warps=1 if heads == 1 else 4,
    )  # fmt: skip
    return out


def launch_attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    cache_blocks: Tensor,
    filled: Tensor,
    blocks: Tensor,
    num_blocks: int,
    window: int,
) -> Tensor:
    """Attend. Arguments and returns are those of `step_attend`."""
    _, length, slots, kv, dim = keys.shape
    rows, heads = q.shape[:2]
    if rows * kv >= _PROGRAMS:
        out = q.new_empty(rows, heads * dim)
        block_d = max(16, triton.next_power_of_2(dim))
        _attend_group_kernel[(rows * kv,)](
            q, keys, values, cache_blocks, filled, blocks, out, length, slots, dim**-0.5, window,
            GROUP=heads // kv, KV=kv, D=dim,
            PIECE=max(16, min(_PIECE, _PIECE_BYTES // (block_d * keys.element_size()))),
            BLOCK_H=max(16, triton.next_power_of_2(heads // kv)), BLOCK_D=block_d,
            EVERY=num_blocks == 1, num_warps=4, num_stages=3,
        )  # fmt: skip
        return out
    wanted = triton.next_power_of_2(triton.cdiv(_PROGRAMS, rows * heads))
    splits = min(64, wanted, triton.next_power_of_2(triton.cdiv(length * slots, _PIECE)))
    partial = q.new_empty(rows * heads, splits, dim, dtype=torch.float32)
    best, total = (q.new_empty(rows * heads, splits, dtype=torch.float32) for _ in range(2))
    out = q.new_empty(rows, heads * dim)
    block_d = triton.next_power_of_2(dim)
    _attend_kernel[(rows * heads, splits)](
        q, keys, values, cache_blocks, filled, blocks, partial, best, total, length, slots,
        dim**-0.5,
        window, H=heads, KV=kv, D=dim, SPLITS=splits, PIECE=_PIECE, BLOCK_D=block_d,
        EVERY=num_blocks == 1, num_warps=4,
    )  # fmt: skip
    _merge_kernel[(rows * heads,)](
        partial, best, total, out, D=dim, SPLITS=splits, BLOCK_D=block_d, num_warps=2
    )
    return out
