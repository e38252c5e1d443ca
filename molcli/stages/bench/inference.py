"""Prefill and decoding, through `model(...)` and `model.generate(...)`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from molcli.stages.bench.measure import Row, Sizes, fitting, seconds
from molcli.stages.bench.models import BenchmarkPair, routed


def prompts(contest: BenchmarkPair, batch: int, length: int) -> Tensor:
    """Random tokens that both models know."""
    vocabulary = min(contest.config.vocab_size, contest.dense.vocab_size)
    return torch.randint(vocabulary, (batch, length), device=contest.device)


@torch.no_grad()
def prefill(contest: BenchmarkPair, sizes: Sizes, compiled: bool) -> Iterator[Row]:
    """Tokens a second to the logits of the last token, without a cache."""

    def rate(model: Any, length: int, kind: str) -> float:
        ids = prompts(contest, 1, length)
        with routed(model, kind, ids):
            work = lambda: model(ids, use_cache=False, logits_to_keep=1)  # noqa: E731
            return length / seconds(work, contest.device, sizes.repeats)

    def timed(model: Any, length: int, kind: str = "") -> float | None:
        return fitting(partial(rate, model, length, kind), contest.device)

    peer = contest.peer(contest.dtype)
    if compiled:
        for layer in peer.model.layers:  # as ours: one kind of layer is compiled once
            layer.compile()
    dense = {length: timed(peer, length) for length in sizes.prefill}
    del peer
    model = contest.mol(contest.dtype)
    if compiled:
        model.compile()
    for length in sizes.prefill:
        for kind in contest.routings:
            work = f"prefill, {length:,} tokens, {kind}"
            yield Row(work, "tokens/s", timed(model, length, kind), dense[length])


@torch.no_grad()
def decode(contest: BenchmarkPair, sizes: Sizes) -> Iterator[Row]:
    """Milliseconds for the next token of every sequence, by `generate` with a static cache: the
    time for many new tokens less that for one."""

    def timed(model: Any, shape: tuple[int, int], kind: str = "") -> float | None:
        return fitting(partial(_step_time, contest, sizes, model, shape, kind), contest.device)

    peer = contest.peer(contest.dtype)
    dense = {shape: timed(peer, shape) for shape in sizes.decode}
    del peer
    model = contest.mol(contest.dtype)
    for batch, context in sizes.decode:
        for kind in contest.routings:
            work = f"decode, {batch} at {context:,} tokens, {kind}"
            shape = batch, context
            yield Row(work, "ms a token", timed(model, shape, kind), dense[shape])


def _step_time(
    contest: BenchmarkPair, sizes: Sizes, model: Any, shape: tuple[int, int], kind: str
) -> float:
    ids = prompts(contest, *shape)

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

    with routed(model, kind, ids):
        many = generated(1 + sizes.new_tokens)
        return (many - generated(1)) / sizes.new_tokens * 1e3
