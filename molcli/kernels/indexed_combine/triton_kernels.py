"""Triton kernels: products and their sum over each token's rows in one launch, or the sum alone."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 8192  # weights that a program reads at a time: 16 KB in bf16


@triton.jit
def _combine_kernel(
    x, weight, blocks, share, base, out, scale,
    SLOTS: tl.constexpr, K: tl.constexpr, N: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token, tile = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = token * SLOTS + slot
        factor = scale
        if SHARED:
            factor *= tl.load(share + row)
        matrix = weight + tl.load(blocks + row) * (N * K)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            mask = inside[:, None] & (k < K)[None, :]
            piece = tl.load(matrix + n[:, None] * K + k[None, :], mask=mask, other=0.0)
            h = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32) * factor
            acc += piece.to(tl.float32) * h[None, :]
    y = tl.sum(acc, 1) + tl.load(base + token * N + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * N + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(
    x, share, base, out, scale,
    SLOTS: tl.constexpr, N: tl.constexpr, SHARED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    token, tile = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    y = tl.zeros((BLOCK_N,), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = token * SLOTS + slot
        factor = scale
        if SHARED:
            factor *= tl.load(share + row)
        y += factor * tl.load(x + row * N + n, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(base + token * N + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * N + n, y.to(out.dtype.element_ty), mask=inside)


def launch(
    x: Tensor, weight: Tensor, blocks: Tensor, gate: Tensor | None, residual: Tensor, scale: float
) -> Tensor:
    """Multiply and sum. Arguments and returns are those of `indexed_combine_reference`."""
    tokens, (_, size, width) = residual.shape[0], weight.shape
    out = torch.empty_like(residual)
    block_k = min(triton.next_power_of_2(width), 2048)
    block_n = max(1, min(_TILE // block_k, triton.next_power_of_2(size)))
    _combine_kernel[(tokens, triton.cdiv(size, block_n))](
        x, weight, blocks, x if gate is None else gate, residual, out, scale,
        SLOTS=x.shape[0] // tokens, K=width, N=size, SHARED=gate is not None,
        BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip
    return out


def launch_sum(x: Tensor, gate: Tensor | None, residual: Tensor, scale: float) -> Tensor:
    """Sum products x: (n * slots, out). Other arguments are those of `indexed_combine`."""
    tokens, size = residual.shape
    out = torch.empty_like(residual)
    _sum_kernel[(tokens, triton.cdiv(size, 1024))](
        x, x if gate is None else gate, residual, out, scale,
        SLOTS=x.shape[0] // tokens, N=size, SHARED=gate is not None, BLOCK_N=1024, num_warps=4,
    )  # fmt: skip
    return out
