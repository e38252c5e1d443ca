"""A training step: loss, gradients and AdamW, weights in fp32, products in bf16 on a GPU."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from molcli.maths.losses import Head, training_loss
from molcli.model.compiled import compile_layers
from molcli.stages.bench.inference import prompts
from molcli.stages.bench.measure import Row, Sizes, fitting, release, seconds
from molcli.stages.bench.models import BenchmarkPair, routed


def train(contest: BenchmarkPair, sizes: Sizes, compiled: bool) -> Iterator[Row]:
    """Tokens a second, of each model at the size that suits it best. Both have compiled layers and
    the loss of `molcli train`."""

    def timed(name: str, model: Any, kind: str = "") -> tuple[float | None, str]:
        model.train()
        if compiled:
            compile_layers(model)
        found = {}
        for batch, length in sizes.train:
            step = partial(_rate, contest, sizes, model, (batch, length), kind, compiled)
            found[fitting(step, contest.device) or 0.0] = batch, length, peak(contest.device)
        best = max(found)
        batch, length, memory = found[best]
        return best or None, f"{name} {batch} × {length:,}{memory}"

    dense, of_dense = timed("dense", contest.peer(torch.float32))
    for kind in contest.routings:
        release(contest.device)
        mol, of_mol = timed("MoL", contest.mol(torch.float32), kind)
        yield Row(f"training, {kind}", "tokens/s", mol, dense, note=f"{of_mol}; {of_dense}")


def peak(device: torch.device) -> str:
    """The most memory held since the last call, in words; empty on a CPU."""
    if device.type != "cuda":
        return ""
    held = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return f", {held:.0f} GiB"


def _rate(
    contest: BenchmarkPair,
    sizes: Sizes,
    model: Any,
    shape: tuple[int, int],
    kind: str,
    compiled: bool,
) -> float:
    device, (batch, length) = contest.device, shape
    model.zero_grad(set_to_none=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = prompts(contest, batch, length)
    weights = {"ce_weight": 1 / ids.numel(), "kl_weight": 0.0}

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            head = Head(hidden, model.get_output_embeddings().weight)
            losses = training_loss(head, ids, None, compiled=compiled, **weights)
        losses.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with routed(model, kind, ids):
        return batch * length / seconds(step, device, sizes.repeats, warm_up=3)
