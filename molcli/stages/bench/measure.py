"""Sizes of the work that is timed, the timing itself, and its results."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from molcli.report.machine import commit, device_name, versions

SECTIONS = ("prefill", "decode", "train", "grouped", "gdn")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the work of all sections.

    Attributes:
        prefill: tokens of a prompt; one sequence each.
        decode: numbers of sequences, and tokens in the cache.
        new_tokens: tokens that one timing decodes.
        train: sequences and tokens per sequence of a training step; the fastest size counts.
        rows: routed rows of the timings of single kernels.
        repeats: timings, of which the median counts.
    """

    prefill: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]
    new_tokens: int
    train: tuple[tuple[int, int], ...]
    rows: int
    repeats: int


GPU_SIZES = Sizes(
    prefill=(4096, 32_768, 131_072),
    decode=((1, 8192), (32, 2048)),
    new_tokens=64,
    train=((2, 4096), (3, 4096), (4, 4096)),
    rows=98_304,
    repeats=3,
)
CPU_SIZES = Sizes(
    prefill=(128, 512),
    decode=((1, 128), (4, 64)),
    new_tokens=8,
    train=((1, 128),),
    rows=512,
    repeats=3,
)


@dataclass(frozen=True)
class Row:
    """One timing.

    Attributes:
        work: what was timed.
        unit: of `mol` and `peer`.
        mol: the Mixture of Layers model's figure; None where memory was too small.
        peer: the peer's figure; None where memory was too small or there is no peer.
        peer_name: "dense", or the name of a library.
        note: settings and peak memory.
    """

    work: str
    unit: str
    mol: float | None
    peer: float | None
    peer_name: str = "dense"
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Speed over the peer's speed: above 1 where the Mixture of Layers model is faster."""
        if not self.mol or not self.peer:
            return None
        return self.peer / self.mol if self.unit.startswith("ms") else self.mol / self.peer


@dataclass(frozen=True)
class Report:
    """All results of a benchmark.

    Attributes:
        model: description of the Mixture of Layers model.
        dense: description of the peer.
        rows: timings.
        loads: per kind of routing, the load of the busiest and of the least busy block over the
            load under uniform routing, over all layers.
        machine: device, versions, seed and commit.
    """

    model: str
    dense: str
    rows: list[Row]
    loads: dict[str, tuple[float, float]]
    machine: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON, with the ratio of each row."""
        values = asdict(self)
        for row, written in zip(self.rows, values["rows"], strict=True):
            written["ratio"] = row.ratio
        return values


def sizes_for(device: torch.device) -> Sizes:
    """Return sizes that take a few minutes on a GPU. Those for a CPU say nothing about a GPU."""
    return GPU_SIZES if device.type == "cuda" else CPU_SIZES


def median_seconds(
    work: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 2
) -> float:
    """Time a call, from an idle device to an idle device.

    Args:
        work: the call.
        device: synchronised before and after each call.
        repeats: timed calls.
        warm_up: calls before them.

    Returns:
        The median of the timed calls.
    """
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        _synchronise(device)
        start = time.perf_counter()
        work()
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def unless_out_of_memory(work: Callable[[], float], device: torch.device) -> float | None:
    """Return the result of `work`, or None if the device's memory is too small. Frees memory."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return None
    finally:
        free_memory(device)


def free_memory(device: torch.device) -> None:
    """Return unused memory to the device, for the next model."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def machine(device: torch.device, seed: int) -> dict[str, str]:
    """Return device, versions, seed and commit."""
    values = {"device": device_name(device), "seed": str(seed), **versions()}
    return values | {"molcli": f"{values['molcli']} {commit()}".strip()}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
