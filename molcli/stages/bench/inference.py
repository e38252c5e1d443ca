"""Prefill and decoding, through `model(...)` and `model.generate(...)`."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from molcli.stages.bench.models import Contest, routed
from molcli.stages.bench.report import Row
from molcli.stages.bench.sizes import Sizes
from molcli.stages.bench.timing import fitting, seconds


def prompts(contest: Contest, batch: int, length: int) -> Tensor:
    """Random tokens that both models know."""
    vocabulary = min(contest.config.vocab_size, contest.dense.vocab_size)
    return torch.randint(vocabulary, (batch, length), device=contest.device)


@torch.no_grad()
def prefill(contest: Contest, sizes: Sizes, compiled: bool) -> Iterator[Row]:
    """Tokens a second to the logits of the last token, without a cache."""

    def timed(model: Any) -> dict[int, float | None]:
        found: dict[int, float | None] = {}
        for length in sizes.prefill:
            ids = prompts(contest, 1, length)

            def rate(ids: Tensor = ids, length: int = length) -> float:
                work = lambda: model(ids, use_cache=False, logits_to_keep=1)  # noqa: E731
                return length / seconds(work, contest.device, sizes.repeats)

            found[length] = fitting(rate, contest.device)
        return found

    peer = contest.peer(contest.dtype)
    if compiled:
        for layer in peer.model.layers:  # as ours: one kind of layer is compiled once
            layer.compile()
    dense = timed(peer)
    del peer
    model = contest.mol(contest.dtype)
    if compiled:
        model.compile()
    for kind in contest.routings:
        with routed(model, kind):
            mol = timed(model)
        for length in sizes.prefill:
            yield Row(
                f"prefill, {length:,} tokens, {kind}",
                "tokens/s",
                mol[length],
                dense[length],
            )


@torch.no_grad()
def decode(contest: Contest, sizes: Sizes) -> Iterator[Row]:
    """Milliseconds for the next token of every sequence, by `generate` with a static cache: the
    time for many new tokens less that for one."""

    def timed(model: Any) -> list[float | None]:
        return [
            fitting(_step_time(contest, sizes, model, prompts(contest, *shape)), contest.device)
            for shape in sizes.decode
        ]

    peer = contest.peer(contest.dtype)
    dense = timed(peer)
    del peer
    model = contest.mol(contest.dtype)
    for kind in contest.routings:
        with routed(model, kind):
            mol = timed(model)
        for (batch, context), ours, theirs in zip(sizes.decode, mol, dense, strict=True):
            work = f"decode, {batch} at {context:,} tokens, {kind}"
            yield Row(work, "ms a token", ours, theirs)


def _step_time(contest: Contest, sizes: Sizes, model: Any, ids: Tensor) -> Callable[[], float]:
    def generated(count: int) -> float:
        def run() -> Any:
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                cache_implementation="static",
            )

        return seconds(run, contest.device, sizes.repeats, warm_up=3)

    def step() -> float:
        many = generated(1 + sizes.new_tokens)
        return (many - generated(1)) / sizes.new_tokens * 1e3

    return step
