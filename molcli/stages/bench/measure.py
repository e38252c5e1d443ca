"""What is timed, how large, how, and what was measured."""

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


def seconds(work: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 2) -> float:
    """The median time of a call, from an idle device to an idle device."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def fitting(work: Callable[[], float], device: torch.device) -> float | None:
    """What `work` returns, or None if the device's memory is too small for it."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return None
    finally:
        release(device)


def release(device: torch.device) -> None:
    """Gives back memory that nothing holds, so that the next model has it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Row:
    """One work. mol, peer: in `unit`, None where it did not fit into memory or has no peer.
    peer_name: what the peer is, "dense" or a library. note: settings and peaks worth a word.
    """

    work: str
    unit: str
    mol: float | None
    peer: float | None
    peer_name: str = "dense"
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Above 1 where the Mixture of Layers model is faster."""
        if not self.mol or not self.peer:
            return None
        return self.peer / self.mol if self.unit.startswith("ms") else self.mol / self.peer


@dataclass(frozen=True)
class Report:
    """model, dense: what was compared, in words. loads: per kind of routing, the busiest and the
    least busy block's share of an even share, over layers."""

    model: str
    dense: str
    rows: list[Row]
    loads: dict[str, tuple[float, float]]
    machine: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        for row, written in zip(self.rows, found["rows"], strict=True):
            written["ratio"] = row.ratio
        return found


def machine(device: torch.device, seed: int) -> dict[str, str]:
    """Device, versions, seed and commit."""
    found = {"device": device_name(device), "seed": str(seed), **versions()}
    return found | {"molcli": f"{found['molcli']} {commit()}".strip()}
