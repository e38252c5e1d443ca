"""Time prefill and decoding, through `model(...)` and `model.generate(...)`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from molcli.stages.bench.measure import Row, Sizes, median_seconds, unless_out_of_memory
from molcli.stages.bench.models import BenchmarkPair
from molcli.stages.bench.routing import forced_routing


@torch.no_grad()
def time_prefill(
    pair: BenchmarkPair, sizes: Sizes, compiled: bool, *, with_peer: bool = True
) -> Iterator[Row]:
    """Measure tokens per second to the logits of the last token, without a cache."""

    def rate(model: Any, length: int, kind: str) -> float:
        ids = pair.random_tokens(1, length)
        with forced_routing(model, kind, ids):
            work = lambda: model(ids, use_cache=False, logits_to_keep=1)  # noqa: E731
            return length / median_seconds(work, pair.device, sizes.repeats)

    def timed(model: Any, length: int, kind: str = "") -> float | None:
        return unless_out_of_memory(partial(rate, model, length, kind), pair.device)

    dense: dict[int, float | None] = {}
    if with_peer:
        peer = pair.peer(pair.dtype)
        if compiled:
            for layer in peer.model.layers:  # like our model: each kind of layer is compiled once
                layer.compile()
        dense = {length: timed(peer, length) for length in sizes.prefill}
        del peer
    model = pair.mol(pair.dtype)
    if compiled:
        model.compile()
    for length in sizes.prefill:
        for kind in pair.routings:
            work = f"prefill, {length:,} tokens, {kind}"
            yield Row(work, "tokens/s", timed(model, length, kind), dense.get(length))


@torch.no_grad()
def time_decoding(pair: BenchmarkPair, sizes: Sizes, *, with_peer: bool = True) -> Iterator[Row]:
    """Measure milliseconds per decoding step of all sequences, by `generate` with a static cache.

    It is the difference between the time for many new tokens and the time for one.
    """

    def timed(model: Any, shape: tuple[int, int], kind: str = "") -> float | None:
        step = partial(_step_milliseconds, pair, sizes, model, shape, kind)
        return unless_out_of_memory(step, pair.device)

    dense: dict[tuple[int, int], float | None] = {}
    if with_peer:
        peer = pair.peer(pair.dtype)
        dense = {shape: timed(peer, shape) for shape in sizes.decode}
        del peer
    model = pair.mol(pair.dtype)
    for batch, context in sizes.decode:
        for kind in pair.routings:
            work = f"decode, {batch} at {context:,} tokens, {kind}"
            shape = batch, context
            yield Row(work, "ms a token", timed(model, shape, kind), dense.get(shape))


def _step_milliseconds(
    pair: BenchmarkPair, sizes: Sizes, model: Any, shape: tuple[int, int], kind: str
) -> float:
    ids = pair.random_tokens(*shape)

    def generation_seconds(count: int) -> float:
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

        return median_seconds(run, pair.device, sizes.repeats, warm_up=3)

    with forced_routing(model, kind, ids):
        many = generation_seconds(1 + sizes.new_tokens)
        return (many - generation_seconds(1)) / sizes.new_tokens * 1e3
