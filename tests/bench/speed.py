"""Speed of a checkpoint, by the functions of `molcli bench`: prefill and decoding."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from molcli.model.checkpoint import default_device
from molcli.stages.bench import Row, open_benchmark_pair
from molcli.stages.bench.inference import time_decoding, time_prefill
from molcli.stages.bench.measure import Sizes, free_memory

PREFILL = 4096  # tokens, if the model has as many positions
BATCHES = 1, 32  # sequences that are decoded at once


def sizes(positions: int, device: torch.device) -> Sizes:
    """Return the sizes of the work. On a CPU, decoding is timed at a shorter context."""
    context, new = (2048, 64) if device.type == "cuda" else (128, 8)
    context = min(context, positions - new - 1)
    decode = tuple((batch, context) for batch in BATCHES)
    return Sizes((min(PREFILL, positions),), decode, new, train=(), rows=0, repeats=3)


def speeds(checkpoint: Path, dense: PreTrainedConfig | None = None) -> dict[str, Any]:
    """Return tokens a second, None where memory was too small, and the sizes of the work.

    As `molcli bench`: random tokens, bfloat16 on a GPU, where layers are compiled for prefill.

    Args:
        checkpoint: a model, with the routing that it has.
        dense: configuration of a transformers model to time, too, with random weights; its figures
            are under "transformers".
    """
    torch.compiler.reset()  # graphs of earlier models count towards a limit
    device = default_device()
    pair = open_benchmark_pair(None, checkpoint, dense, device)
    size = sizes(pair.config.max_position_embeddings, device)
    compiled, with_peer = device.type == "cuda", dense is not None
    rows: list[Row] = []
    for timings in (
        time_prefill(pair, size, compiled, with_peer=with_peer),
        time_decoding(pair, size, with_peer=with_peer),
    ):
        free_memory(device)
        rows += timings
    found = _rates([row.mol for row in rows])
    if with_peer:
        found["transformers"] = _rates([row.peer for row in rows])
    return found | {"prefill_tokens": size.prefill[0], "context": size.decode[0][1]}


def _rates(figures: list[float | None]) -> dict[str, Any]:
    prefill, *milliseconds = figures
    rates = {"prefill": prefill and round(prefill)}
    for batch, step in zip(BATCHES, milliseconds, strict=True):
        rates[f"decode_{batch}"] = step and round(batch * 1e3 / step)
    return rates
