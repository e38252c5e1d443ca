"""Time a training step: loss, gradients and AdamW; fp32 weights, on a GPU bf16 products."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from molcli.maths.losses import Head, training_loss
from molcli.model.compiled import compile_layers
from molcli.stages.bench.measure import (
    Row,
    Sizes,
    free_memory,
    median_seconds,
    unless_out_of_memory,
)
from molcli.stages.bench.models import BenchmarkPair
from molcli.stages.bench.routing import forced_routing


def time_training(pair: BenchmarkPair, sizes: Sizes, compiled: bool) -> Iterator[Row]:
    """Measure tokens per second, of each model at its fastest batch size.

    Both models have compiled layers and the loss of `molcli train`.
    """

    def timed(name: str, model: Any, kind: str = "") -> tuple[float | None, str]:
        model.train()
        if compiled:
            compile_layers(model)
        rates = {}
        for batch, length in sizes.train:
            step = partial(_tokens_per_second, pair, sizes, model, (batch, length), kind, compiled)
            rate = unless_out_of_memory(step, pair.device) or 0.0
            rates[rate] = batch, length, _peak_memory(pair.device)
        best = max(rates)
        batch, length, memory = rates[best]
        return best or None, f"{name} {batch} × {length:,}{memory}"

    dense, dense_note = timed("dense", pair.peer(torch.float32))
    for kind in pair.routings:
        free_memory(pair.device)
        mol, mol_note = timed("MoL", pair.mol(torch.float32), kind)
        yield Row(f"training, {kind}", "tokens/s", mol, dense, note=f"{mol_note}; {dense_note}")


def _peak_memory(device: torch.device) -> str:
    """Peak memory since the last call, as text; empty on a CPU."""
    if device.type != "cuda":
        return ""
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return f", {peak:.0f} GiB"


def _tokens_per_second(
    pair: BenchmarkPair,
    sizes: Sizes,
    model: Any,
    shape: tuple[int, int],
    kind: str,
    compiled: bool,
) -> float:
    device, (batch, length) = pair.device, shape
    model.zero_grad(set_to_none=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = pair.random_tokens(batch, length)
    weights = {"ce_weight": 1 / ids.numel(), "kl_weight": 0.0}

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            head = Head(hidden, model.get_output_embeddings().weight)
            losses = training_loss(head, ids, None, compiled=compiled, **weights)
        losses.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with forced_routing(model, kind, ids):
        return batch * length / median_seconds(step, device, sizes.repeats, warm_up=3)
