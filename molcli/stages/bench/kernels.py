"""Single operations over routed rows, at the model's shapes."""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.kernels.gated_delta_rule import gated_delta_rule
from molcli.kernels.gated_delta_rule.fla_check import fla_is_correct
from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.packed_rows import PackedRows, routed_rows
from molcli.stages.bench.measure import Row, Sizes, fitting, seconds
from molcli.stages.bench.models import SKEW, BenchmarkPair


def layouts(contest: BenchmarkPair, sizes: Sizes) -> Iterator[tuple[str, PackedRows]]:
    """Rows as routers make them out of normal logits, with and without the skew's biases."""
    config = contest.config
    count, slots = config.num_routed_blocks, config.num_blocks_per_tok
    if not count:
        return
    tokens = sizes.rows // slots
    document = torch.zeros(tokens, dtype=torch.int64, device=contest.device)
    for kind, skew in (("even", 0.0), ("skewed", SKEW)):
        ramp = torch.linspace(skew, -skew, count, device=contest.device)
        chosen = (torch.randn(tokens, count, device=contest.device) + ramp).topk(slots).indices
        yield kind, routed_rows(chosen, document, 1, count, tokens)


def grouped(contest: BenchmarkPair, sizes: Sizes) -> Iterator[Row]:
    """TFLOP/s of all grouped products of a routed block, forward and backward; the peer is one
    plain product of the same size for each."""
    config = contest.config
    thin, inner = config.d_thin, config.num_heads_thin * config.head_dim
    shapes = [(config.hidden_size, thin), (inner, thin), (config.d_ff_thin, thin)]
    shapes += [(thin, inner)] * 4 + [(thin, config.d_ff_thin)] * (1 + config.mlp_gated)
    shapes += [(thin, config.hidden_size)]
    for kind, rows in layouts(contest, sizes):
        count = rows.tokens.shape[0]
        flops = 6 * count * sum(a * b for a, b in shapes)

        def rate(rows: PackedRows | None, count: int = count, flops: int = flops) -> float:
            spent = {(a, b): _product(contest, sizes, rows, count, a, b) for a, b in set(shapes)}
            return flops / sum(spent[shape] for shape in shapes) / 1e12

        found = [fitting(partial(rate, layout), contest.device) for layout in (rows, None)]
        yield Row(
            f"grouped products, {count:,} rows, {kind}",
            "TFLOP/s",
            found[0],
            found[1],
            "one product",
        )


def _product(
    contest: BenchmarkPair,
    sizes: Sizes,
    rows: PackedRows | None,
    count: int,
    inputs: int,
    outputs: int,
) -> float:
    """Seconds of one product with its gradients; rows: None for a single block."""

    def draw(*shape: int, gradient: bool = True) -> Tensor:
        return torch.randn(
            shape, device=contest.device, dtype=contest.dtype, requires_grad=gradient
        )

    x, grad = draw(count, inputs), draw(count, outputs, gradient=False)
    w = draw(1 if rows is None else rows.num_blocks, outputs, inputs)

    def run() -> Any:
        out = F.linear(x, w[0]) if rows is None else grouped_linear(x, w, rows)
        return torch.autograd.grad(out, (x, w), grad)

    return seconds(run, contest.device, sizes.repeats)


@torch.no_grad()
def deltanet(contest: BenchmarkPair, sizes: Sizes) -> Iterator[Row]:
    """Milliseconds of the gated delta rule over routed rows, forward, beside fla-core's."""
    heads, dim, device = (
        contest.config.num_heads_thin,
        contest.config.head_dim,
        contest.device,
    )
    fla = device.type == "cuda" and fla_is_correct(device.index or 0, dim)
    for kind, rows in layouts(contest, sizes):
        count, segments = rows.tokens.shape[0], rows.cu_seqlens.shape[0] - 1
        shape = (count, heads, dim)
        q, k, v = (torch.randn(shape, device=device, dtype=contest.dtype) for _ in range(3))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        g = -torch.rand(count, heads, device=device)
        beta = torch.rand(count, heads, device=device)
        state = torch.zeros(segments, heads, dim, dim, device=device)
        inputs = (q, k, v, g, beta)
        ours = partial(gated_delta_rule, *inputs, rows.cu_seqlens, rows.max_seqlen, state)
        theirs = partial(_fla, inputs, rows.cu_seqlens.long(), state) if fla else None
        times = [
            None if work is None else fitting(partial(_milliseconds, contest, sizes, work), device)
            for work in (ours, theirs)
        ]
        name = f"gated delta rule, {count:,} rows × {heads} × {dim}, {kind}"
        yield Row(name, "ms", times[0], times[1], "fla-core")


def _fla(inputs: tuple[Tensor, ...], cu_seqlens: Tensor, state: Tensor) -> Any:
    """fla-core's kernel as it is."""
    chunk = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    q, k, v, g, beta = (x[None] for x in inputs)
    return chunk(
        q, k, v, g, beta, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens
    )


def _milliseconds(contest: BenchmarkPair, sizes: Sizes, work: Callable[[], Any]) -> float:
    return 1e3 * seconds(work, contest.device, sizes.repeats)
