"""Triton kernel: a program sums the odds of a row, then searches the place that was drawn."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIECE = 4096  # entries that a program reads at a time


@triton.jit
def _draw_kernel(
    logits, uniform, out, scale,
    V: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * V
    lane = tl.arange(0, PIECE)
    # Each lane keeps its own peak and sum, so that only the last step compares lanes.
    peaks = tl.full((PIECE,), -float("inf"), tl.float32)
    sums = tl.zeros((PIECE,), tl.float32)
    for piece in range(PIECES):
        index = piece * PIECE + lane
        x = tl.load(source + index, mask=index < V, other=-float("inf")).to(tl.float32) * scale
        higher = tl.maximum(peaks, x)
        level = tl.where(higher == -float("inf"), 0.0, higher)
        sums = sums * tl.exp(peaks - level) + tl.exp(x - level)
        peaks = higher
    peak = tl.max(peaks, 0)
    total = tl.sum(sums * tl.exp(peaks - peak), 0)  # NaN if all are -inf, or one is inf or NaN
    # Above 0: an entry whose odds are 0 must not be drawn.
    wanted = ((1.0 - tl.load(uniform + row)) * total.to(tl.float64)).to(tl.float32)
    before = tl.full((), 0.0, tl.float32)
    drawn, last = tl.full((), -1, tl.int32), tl.full((), -1, tl.int32)
    piece = tl.full((), 0, tl.int32)
    while (drawn < 0) & (piece < PIECES):
        index = piece * PIECE + lane
        x = tl.load(source + index, mask=index < V, other=-float("inf")).to(tl.float32) * scale
        odds = tl.exp(x - peak)
        mass = tl.sum(odds, 0)
        # Sums round differently here, so that the place may lie behind the last possible entry.
        last = tl.maximum(last, tl.max(tl.where(odds > 0, index, -1), 0))
        if before + mass >= wanted:
            reached = (before + tl.cumsum(odds, 0) >= wanted) & (odds > 0)
            found = tl.min(tl.where(reached, index, V), 0)
            drawn = tl.where(found < V, found, drawn)
        before += mass
        piece += 1
    drawn = tl.where(drawn < 0, last, drawn)
    tl.store(out + row, tl.where(total > 0, drawn, -1).to(tl.int64))


def launch(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draw. Arguments and returns are those of `draw_tokens`."""
    rows, size = logits.shape
    out = logits.new_empty(rows, dtype=torch.int64)
    piece = min(_PIECE, triton.next_power_of_2(size))
    _draw_kernel[(rows,)](
        logits.contiguous(), uniform, out, 1 / temperature,
        V=size, PIECE=piece, PIECES=triton.cdiv(size, piece), num_warps=8,
    )  # fmt: skip
    return out
