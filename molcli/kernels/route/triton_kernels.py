"""Triton kernel: one program computes a token's logits, and selects and weights its blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _route_kernel(
    x, weight, correction, logits_out, blocks_out, weights_out,
    D: tl.constexpr, R: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    real = r < R
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        known = d < D
        h = tl.load(x + token * D + d, mask=known, other=0.0).to(tl.float32)
        mask = real[:, None] & known[None, :]
        matrix = tl.load(weight + r[:, None] * D + d[None, :], mask=mask, other=0.0)
        acc += matrix.to(tl.float32) * h[None, :]
        squares += h * h
    logits = tl.sum(acc, 1) * tl.rsqrt(tl.sum(squares, 0) / D + 1e-6)
    tl.store(logits_out + token * R + r, logits, mask=real)
    ranked = logits + tl.load(correction + r, mask=real, other=0.0)
    left = tl.where(real, ranked, -float("inf"))
    chosen = tl.zeros((BLOCK_R,), tl.int1)
    for slot in tl.static_range(TOP_K):
        best = tl.max(left, 0)
        # The lowest index of the largest value; a valid index even if all values are NaN.
        block = tl.minimum(tl.min(tl.where(left == best, r, BLOCK_R), 0), R - 1)
        tl.store(blocks_out + token * TOP_K + slot, block.to(tl.int64))
        chosen = chosen | (r == block)
        left = tl.where(r == block, -float("inf"), left)
    among = chosen
    if TOP_K == 1:
        among = real
    kept = tl.where(among, logits, -float("inf"))
    share = tl.exp(kept - tl.max(kept, 0))
    share = share / tl.sum(share, 0)
    left = tl.where(real, ranked, -float("inf"))
    for slot in tl.static_range(TOP_K):
        best = tl.max(left, 0)
        block = tl.minimum(tl.min(tl.where(left == best, r, BLOCK_R), 0), R - 1)
        value = tl.sum(tl.where(r == block, share, 0.0), 0)
        tl.store(weights_out + token * TOP_K + slot, value)
        left = tl.where(r == block, -float("inf"), left)


def launch(
    x: Tensor, weight: Tensor, correction_bias: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Route tokens. Arguments and returns are those of `route`."""
    tokens, width = x.shape
    count = weight.shape[0]
    logits = x.new_empty(tokens, count, dtype=torch.float32)
    blocks = x.new_empty(tokens, top_k, dtype=torch.int64)
    weights = x.new_empty(tokens, top_k, dtype=torch.float32)
    block_r = max(2, triton.next_power_of_2(count))
    block_d = max(16, min(triton.next_power_of_2(width), 32_768 // block_r))
    _route_kernel[(tokens,)](
        x, weight, correction_bias, logits, blocks, weights,
        D=width, R=count, TOP_K=top_k, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=16,
    )  # fmt: skip
    return logits, blocks, weights
