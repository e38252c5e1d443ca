"""Triton kernels: one program per row and tile of outputs, or per block and tile of outputs.

Each program reads its weights once, in tiles that span all of the reduced dimension or a long piece
of it, and sums in float32. The norm needs no extra pass: its weight multiplies the inputs, and its
scale, which depends on their sum of squares, multiplies the outputs.
"""

import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
_SEGMENTS = 6
_TILE = 8192  # weights of a program and step: 16 KB in bf16


@triton.jit
def _activate(x, NAME: tl.constexpr):
    if NAME == "silu":
        x = x / (1 + tl.exp(-x))
    elif NAME == "gelu":
        x = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1 + tl.exp(-2 * z))  # (1 + tanh z) / 2 is the logistic function of 2 z
    elif NAME == "relu":
        x = tl.maximum(x, 0)
    return x


@triton.jit
def _place(
    tile,
    w0, w1, w2, w3, w4, w5,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    N3: tl.constexpr, N4: tl.constexpr, N5: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile's weight: pointer, number of outputs, first output, and the tile's number in it."""
    w, size, first, local = w0, tl.full((), N0, tl.int32), tile * 0, tile
    T1: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    T2: tl.constexpr = T1 + (N1 + BLOCK_N - 1) // BLOCK_N
    T3: tl.constexpr = T2 + (N2 + BLOCK_N - 1) // BLOCK_N
    T4: tl.constexpr = T3 + (N3 + BLOCK_N - 1) // BLOCK_N
    T5: tl.constexpr = T4 + (N4 + BLOCK_N - 1) // BLOCK_N
    if SEGMENTS > 1:
        past = tile >= T1
        w = tl.where(past, w1, w)
        size = tl.where(past, N1, size)
        first = tl.where(past, N0, first)
        local = tl.where(past, tile - T1, local)
    if SEGMENTS > 2:
        past = tile >= T2
        w = tl.where(past, w2, w)
        size = tl.where(past, N2, size)
        first = tl.where(past, N0 + N1, first)
        local = tl.where(past, tile - T2, local)
    if SEGMENTS > 3:
        past = tile >= T3
        w = tl.where(past, w3, w)
        size = tl.where(past, N3, size)
        first = tl.where(past, N0 + N1 + N2, first)
        local = tl.where(past, tile - T3, local)
    if SEGMENTS > 4:
        past = tile >= T4
        w = tl.where(past, w4, w)
        size = tl.where(past, N4, size)
        first = tl.where(past, N0 + N1 + N2 + N3, first)
        local = tl.where(past, tile - T4, local)
    if SEGMENTS > 5:
        past = tile >= T5
        w = tl.where(past, w5, w)
        size = tl.where(past, N5, size)
        first = tl.where(past, N0 + N1 + N2 + N3 + N4, first)
        local = tl.where(past, tile - T5, local)
    return w, size, first, local


@triton.jit
def _rows_kernel(
    x, plus, norm, w0, w1, w2, w3, w4, w5, bias, residual, blocks, out, eps,
    X_DIV: tl.constexpr, K: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    N3: tl.constexpr, N4: tl.constexpr, N5: tl.constexpr,
    SEGMENTS: tl.constexpr, TOTAL: tl.constexpr, PAIR: tl.constexpr, ACT: tl.constexpr,
    HAS_PLUS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0), tl.program_id(1)
    block = tl.load(blocks + row)
    w, size, first, local = _place(
        tile, w0, w1, w2, w3, w4, w5, N0, N1, N2, N3, N4, N5, SEGMENTS, BLOCK_N
    )
    n = local * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < size
    w += block * size * K
    pair = w1 + block * size * K
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc_pair = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < K
        mask = inside[:, None] & known[None, :]
        matrix = tl.load(w + n[:, None] * K + k[None, :], mask=mask, other=0.0)
        if PAIR:
            matrix_pair = tl.load(pair + n[:, None] * K + k[None, :], mask=mask, other=0.0)
        h = tl.load(x + (row // X_DIV) * K + k, mask=known, other=0.0).to(tl.float32)
        if HAS_PLUS:
            h += tl.load(plus + row * K + k, mask=known, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += h * h
            h *= tl.load(norm + block * K + k, mask=known, other=0.0).to(tl.float32)
        acc += matrix.to(tl.float32) * h[None, :]
        if PAIR:
            acc_pair += matrix_pair.to(tl.float32) * h[None, :]
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    y = tl.sum(acc, 1) * scale
    if HAS_BIAS:
        y += tl.load(bias + block * TOTAL + first + n, mask=inside, other=0.0).to(tl.float32)
    y = _activate(y, ACT)
    if PAIR:
        y *= tl.sum(acc_pair, 1) * scale
    place = row * TOTAL + first + n
    if HAS_RESIDUAL:
        y += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _blocks_kernel(
    x, plus, norm, w0, w1, w2, w3, w4, w5, bias, residual, order, starts, out, eps,
    X_DIV: tl.constexpr, K: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    N3: tl.constexpr, N4: tl.constexpr, N5: tl.constexpr,
    SEGMENTS: tl.constexpr, TOTAL: tl.constexpr, PAIR: tl.constexpr, ACT: tl.constexpr,
    HAS_PLUS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
    w, size, first, local = _place(
        tile, w0, w1, w2, w3, w4, w5, N0, N1, N2, N3, N4, N5, SEGMENTS, BLOCK_N
    )
    n = local * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < size
    w += block * size * K
    pair = w1 + block * size * K
    begin, end = tl.load(starts + block), tl.load(starts + block + 1)
    top = begin
    while top < end:
        index = top + tl.arange(0, BLOCK_M)
        own = index < end
        row = tl.load(order + index, mask=own, other=0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_pair = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            known = k < K
            mask = own[:, None] & known[None, :]
            h = tl.load(x + (row // X_DIV)[:, None] * K + k[None, :], mask=mask, other=0.0)
            if HAS_PLUS or HAS_NORM:
                wide = h.to(tl.float32)
                if HAS_PLUS:
                    more = tl.load(plus + row[:, None] * K + k[None, :], mask=mask, other=0.0)
                    wide += more.to(tl.float32)
                if HAS_NORM:
                    squares += tl.sum(wide * wide, 1)
                    shape = tl.load(norm + block * K + k, mask=known, other=0.0)
                    wide *= shape.to(tl.float32)[None, :]
                h = wide.to(x.dtype.element_ty)
            mask = known[:, None] & inside[None, :]
            matrix = tl.load(w + n[None, :] * K + k[:, None], mask=mask, other=0.0)
            acc = tl.dot(h, matrix, acc, input_precision="ieee")
            if PAIR:
                matrix = tl.load(pair + n[None, :] * K + k[:, None], mask=mask, other=0.0)
                acc_pair = tl.dot(h, matrix, acc_pair, input_precision="ieee")
        y = acc
        if HAS_NORM:
            scale = tl.rsqrt(squares / K + eps)[:, None]
            y *= scale
            acc_pair *= scale
        if HAS_BIAS:
            shift = tl.load(bias + block * TOTAL + first + n, mask=inside, other=0.0)
            y += shift.to(tl.float32)[None, :]
        y = _activate(y, ACT)
        if PAIR:
            y *= acc_pair
        place = row[:, None] * TOTAL + (first + n)[None, :]
        mask = own[:, None] & inside[None, :]
        if HAS_RESIDUAL:
            y += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + place, y.to(out.dtype.element_ty), mask=mask)
        top += BLOCK_M


@triton.jit
def _activation_kernel(
    y, out, SIZE: tl.constexpr, PAIR: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < SIZE
    source = y + row * (SIZE * (1 + PAIR)) + n
    x = _activate(tl.load(source, mask=inside, other=0.0).to(tl.float32), ACT)
    if PAIR:
        x *= tl.load(source + SIZE, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + n, x.to(out.dtype.element_ty), mask=inside)


def launch_activation(y: Tensor, name: str, size: int) -> Tensor:
    """Apply an activation of ACTIVATIONS. Arguments and returns are those of `activate`."""
    rows, width = y.shape
    out = y.new_empty(rows, size)
    block = min(1024, triton.next_power_of_2(size))
    _activation_kernel[(rows, triton.cdiv(size, block))](
        y, out, SIZE=size, PAIR=width > size, ACT=ACTIVATIONS[name], BLOCK=block, num_warps=4
    )
    return out


def launch(
    x: Tensor,
    weights: list[Tensor],
    blocks: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    delta: Tensor | None,
    norm: Tensor | None,
    eps: float,
    activation: str | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Run the layer. Arguments and returns are those of `indexed_linear`.

    order, starts: those of a `BlockOrder`, for one program per block and tile of outputs; None for
    one program per row and tile of outputs.
    """
    rows, width = blocks.shape[0], x.shape[1]
    pair = activation is not None and len(weights) == 2
    sizes = [w.shape[1] for w in (weights[:1] if pair else weights)]
    total = sum(sizes)
    out = x.new_empty(rows, total)
    pointers = [*weights, *(weights[:1] * (_SEGMENTS - len(weights)))]
    sizes_padded = [*sizes, *([0] * (_SEGMENTS - len(sizes)))]
    optional = (delta, norm, bias, residual)
    settings = dict(
        zip(("N0", "N1", "N2", "N3", "N4", "N5"), sizes_padded, strict=True),
        X_DIV=rows // x.shape[0],
        K=width,
        SEGMENTS=len(sizes),
        TOTAL=total,
        PAIR=pair,
        ACT="none" if activation is None else ACTIVATIONS[activation],
        HAS_PLUS=delta is not None,
        HAS_NORM=norm is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
    )
    delta, norm, bias, residual = (x if z is None else z for z in optional)
    head = (x, delta, norm, *pointers, bias, residual)
    if order is None or starts is None:
        block_k = min(triton.next_power_of_2(width), 2048)
        block_n = max(1, min(_TILE // block_k, triton.next_power_of_2(max(sizes))))
        if pair:
            block_n = max(1, block_n // 2)
        tiles = sum(triton.cdiv(n, block_n) for n in sizes)
        _rows_kernel[(rows, tiles)](
            *head, blocks, out, eps, **settings, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4
        )
        return out
    num_blocks = weights[0].shape[0]
    block_m = 16 if rows <= 16 * num_blocks else 32 if rows <= 32 * num_blocks else 64
    # At most 60 KB of shared memory, which GPUs before Hopper have too.
    block_n, block_k = 32, (256 if block_m < 64 else 128) // x.element_size()
    if num_blocks * total < 132 * block_n:  # too few tiles to keep a GPU busy
        block_n = 16
    tiles = sum(triton.cdiv(n, block_n) for n in sizes)
    _blocks_kernel[(tiles, num_blocks)](
        *head, order, starts, out, eps, **settings,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
