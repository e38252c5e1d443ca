"""A training step: loss, gradients and AdamW, weights in fp32, products in bf16 on a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from molcli.model.compiled import compile_layers
from molcli.stages.bench.inference import prompts
from molcli.stages.bench.models import Contest, routed
from molcli.stages.bench.report import Row
from molcli.stages.bench.sizes import Sizes
from molcli.stages.bench.timing import fitting, release, seconds


def train(contest: Contest, sizes: Sizes, compiled: bool) -> Iterator[Row]:
    """Tokens a second."""
    batch, length = sizes.train
    peaks: dict[str, str] = {}

    def timed(name: str, model: Any, compile_it: Callable[[Any], Any]) -> float | None:
        rate = fitting(lambda: _rate(contest, sizes, model, compile_it), contest.device)
        if contest.device.type == "cuda":
            peaks[name] = f"{torch.cuda.max_memory_allocated() / 2**30:.0f} GiB"
            torch.cuda.reset_peak_memory_stats()
        return rate

    nothing: Callable[[Any], Any] = lambda model: None  # noqa: E731
    dense = timed(
        "dense", contest.peer(torch.float32), (lambda m: m.compile()) if compiled else nothing
    )
    for kind in contest.routings:
        release(contest.device)
        model = contest.mol(torch.float32)
        with routed(model, kind):
            mol = timed("MoL", model, compile_layers if compiled else nothing)
        del model
        note = ", ".join(f"{name} peak {peak}" for name, peak in sorted(peaks.items()))
        yield Row(
            f"training, {batch} × {length:,} tokens, {kind}", "tokens/s", mol, dense, note=note
        )


def _rate(contest: Contest, sizes: Sizes, model: Any, compile_it: Callable[[Any], Any]) -> float:
    batch, length = sizes.train
    device = contest.device
    model.train()
    compile_it(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = prompts(contest, batch, length)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return batch * length / seconds(step, device, sizes.repeats, warm_up=3)
