"""A training step: loss, gradients and AdamW, weights in fp32, products in bf16 on a GPU."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from molcli.model.compiled import compile_layers
from molcli.stages.bench.inference import prompts
from molcli.stages.bench.models import Contest, routed
from molcli.stages.bench.report import Row
from molcli.stages.bench.sizes import Sizes
from molcli.stages.bench.timing import fitting, release, seconds


def train(contest: Contest, sizes: Sizes, compiled: bool) -> Iterator[Row]:
    """Tokens a second, of each model at the size that suits it best."""

    def timed(name: str, model: Any, compile_it: Callable[[Any], Any]) -> tuple[float | None, str]:
        model.train()
        if compiled:
            compile_it(model)
        found = {}
        for batch, length in sizes.train:
            rate = fitting(partial(_rate, contest, sizes, model, batch, length), contest.device)
            found[rate or 0.0] = (batch, length, peak(contest.device))
        best = max(found)
        batch, length, memory = found[best]
        return best or None, f"{name} {batch} × {length:,}{memory}"

    dense, of_dense = timed(
        "dense", contest.peer(torch.float32), lambda m: m.compile(dynamic=False)
    )
    for kind in contest.routings:
        release(contest.device)
        model = contest.mol(torch.float32)
        with routed(model, kind):
            mol, of_mol = timed("MoL", model, compile_layers)
        del model
        yield Row(f"training, {kind}", "tokens/s", mol, dense, note=f"{of_mol}; {of_dense}")


def peak(device: torch.device) -> str:
    """The most memory held since the last call, in words; empty on a CPU."""
    if device.type != "cuda":
        return ""
    held = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return f", {held:.0f} GiB"


def _rate(contest: Contest, sizes: Sizes, model: Any, batch: int, length: int) -> float:
    device = contest.device
    model.zero_grad(set_to_none=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = prompts(contest, batch, length)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return batch * length / seconds(step, device, sizes.repeats, warm_up=3)
