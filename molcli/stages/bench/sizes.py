"""What is timed, and how large."""

from dataclasses import dataclass

import torch

SECTIONS = ("prefill", "decode", "train", "grouped", "gdn")


@dataclass(frozen=True)
class Sizes:
    """prefill: prompt lengths, one sequence. decode: (sequences, context). new_tokens: decoded for
    one timing. train: (sequences, tokens) of a step, of which the best counts. rows: routed rows
    for single kernels. repeats: of which the median counts.
    """

    prefill: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]
    new_tokens: int
    train: tuple[tuple[int, int], ...]
    rows: int
    repeats: int


GPU = Sizes(
    prefill=(4096, 32_768, 131_072),
    decode=((1, 8192), (32, 2048)),
    new_tokens=64,
    train=((2, 4096), (3, 4096), (4, 4096)),
    rows=98_304,
    repeats=3,
)
CPU = Sizes(
    prefill=(128, 512),
    decode=((1, 128), (4, 64)),
    new_tokens=8,
    train=((1, 128),),
    rows=512,
    repeats=3,
)


def sizes_for(device: torch.device) -> Sizes:
    """A few minutes' worth on a GPU; elsewhere little, and no measure of what a GPU would do."""
    return GPU if device.type == "cuda" else CPU
