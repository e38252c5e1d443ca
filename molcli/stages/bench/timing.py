"""Medians of wall time, once warm."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


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
