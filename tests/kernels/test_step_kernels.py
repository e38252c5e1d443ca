"""Decoding's Triton kernels against their references, compiled or interpreted.

A kernel's error, against the reference in float64, may be twice that of the reference in the same
dtype. In float32 both are rounding errors, whose size depends on the order of sums, so an error in
its last two bits is always allowed. The interpreter cannot multiply matrices in bf16, so half
precision is fp16 there.
"""

import importlib

import pytest
import torch

from molcli.kernels.decode_rows import (
    BlockOrder,
    DecodeRows,
    all_decode_rows,
    routed_decode_rows,
    sort_by_block,
    sort_by_block_reference,
)
from molcli.kernels.gated_delta_step import gated_delta_step, gated_delta_step_reference
from molcli.kernels.indexed_combine import indexed_combine
from molcli.kernels.indexed_combine.reference import indexed_combine_reference
from molcli.kernels.indexed_linear import indexed_linear, indexed_linear_reference
from molcli.kernels.indexed_linear.dense import MIN_DENSE_ROWS, suits_dense
from molcli.kernels.route import route, route_reference
from molcli.kernels.step_attention import (
    step_append,
    step_append_reference,
    step_attend,
    step_attend_reference,
)

BLOCKS = 5


@pytest.fixture(params=["full", "half"])
def draw(request, triton_device):
    """Draws a normal tensor in the dtype and on the device of the test."""
    generator = torch.Generator().manual_seed(0)
    half = torch.bfloat16 if triton_device == "cuda" else torch.float16
    default = torch.float32 if request.param == "full" else half

    def make(*shape, dtype=default):
        return torch.randn(shape, generator=generator).to(triton_device, dtype)

    return make


def exact(value):
    if isinstance(value, list):
        return [exact(x) for x in value]
    return (
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    )


def check(found, eager, truth, what=""):
    def distance(x):
        return ((x.double() - truth).norm() / truth.norm()).item()

    error, allowed = distance(found), distance(eager)
    print(f"{what} error {error:.2e}, eager {allowed:.2e}")
    assert found.dtype == eager.dtype and found.shape == eager.shape
    assert error <= 2 * allowed + 2.5e-7


def rows_of(blocks, is_sorted):
    by_block = BlockOrder(*sort_by_block_reference(blocks, BLOCKS)) if is_sorted else None
    return DecodeRows(blocks, BLOCKS, by_block)


# Unsorted rows take a program each, sorted ones a program per block; 36 rows of a block are more
# than one tile of rows. 192 and 24 are no powers of two; 2304 is wider than one tile.
@pytest.mark.parametrize(
    "is_sorted, count, shared, width, sizes",
    [
        (False, 1, 1, 64, [64]),
        (False, 4, 2, 192, [5, 4, 4, 4, 3, 3]),
        (False, 2, 1, 2304, [8]),
        (True, 4, 2, 192, [5, 4, 4, 4, 3, 3]),
        (True, 40, 1, 24, [20, 33]),
    ],
)
def test_linear_layers(draw, triton_device, is_sorted, count, shared, width, sizes):
    blocks = torch.arange(count, device=triton_device) * 3 % BLOCKS
    if count == 40:
        blocks[:36] = 2
    total = sum(sizes)
    x, weights = draw(count // shared, width), [draw(BLOCKS, n, width) for n in sizes]
    everything = dict(
        delta=draw(count, width),
        norm=draw(BLOCKS, width),
        eps=1e-6,
        bias=draw(BLOCKS, total),
        residual=draw(count, total),
    )
    for options in ({}, everything):
        found = indexed_linear(x, weights, rows_of(blocks, is_sorted), **options)
        eager = indexed_linear_reference(x, weights, blocks, **options)
        precise = {name: exact(value) for name, value in options.items()}
        truth = indexed_linear_reference(exact(x), exact(weights), blocks, **precise)
        check(found, eager, truth)


@pytest.mark.parametrize("is_sorted", [False, True], ids=["rows", "sorted"])
@pytest.mark.parametrize(
    "activation, gated",
    [("silu", True), ("gelu", False), ("gelu_pytorch_tanh", True), ("relu", False), ("mish", True)],
)
def test_feed_forward_layers(draw, triton_device, is_sorted, activation, gated):
    """mish has no kernel."""
    blocks = torch.tensor([0, 3], device=triton_device)
    x, weights = draw(2, 48), [draw(BLOCKS, 20, 48) for _ in range(1 + gated)]
    options = dict(norm=draw(BLOCKS, 48), eps=1e-6, activation=activation)
    found = indexed_linear(x, weights, rows_of(blocks, is_sorted), **options)
    eager = indexed_linear_reference(x, weights, blocks, **options)
    options["norm"] = exact(options["norm"])
    check(found, eager, indexed_linear_reference(exact(x), exact(weights), blocks, **options))


@pytest.mark.parametrize(
    "activation, gated", [(None, False), ("silu", True), ("gelu", False), ("mish", True)]
)
def test_many_rows_of_one_block(draw, triton_device, poisoned, activation, gated):
    """Ordinary products, which compute the same."""
    rows = all_decode_rows(MIN_DENSE_ROWS, 1, triton_device)
    sizes = [40, 24, 24] if activation is None else [40] * (1 + gated)
    total = sum(sizes) if activation is None else sizes[0]
    x, weights = draw(MIN_DENSE_ROWS, 96), [draw(1, n, 96) for n in sizes]
    everything = dict(
        delta=draw(MIN_DENSE_ROWS, 96),
        norm=draw(1, 96),
        eps=1e-6,
        bias=draw(1, sum(sizes)),
        residual=draw(MIN_DENSE_ROWS, total),
    )
    assert suits_dense(weights, MIN_DENSE_ROWS)
    for options in (dict(activation=activation), everything | dict(activation=activation)):
        before = options["residual"].clone() if "residual" in options else None
        found = indexed_linear(x, weights, rows, **options)
        eager = indexed_linear_reference(x, weights, rows.blocks, **options)
        precise = {name: exact(value) for name, value in options.items()}
        truth = indexed_linear_reference(exact(x), exact(weights), rows.blocks, **precise)
        check(found, eager, truth)
        assert before is None or torch.equal(before, options["residual"])


@pytest.mark.parametrize("tokens, slots", [(1, 3), (9, 2)])
@pytest.mark.parametrize("gated", [False, True])
def test_combining(draw, triton_device, tokens, slots, gated):
    """Eighteen rows are sorted: the products come first, the sum after them."""
    chosen = torch.arange(tokens * slots, device=triton_device).view(tokens, slots) % BLOCKS
    rows = routed_decode_rows(chosen, BLOCKS)
    assert (rows.by_block is None) == (tokens < 9)
    x, weight, base = draw(tokens * slots, 24), draw(BLOCKS, 40, 24), draw(tokens, 40)
    gate = draw(tokens, slots, dtype=torch.float32) if gated else None
    found = indexed_combine(x, weight, rows, gate, base, 0.5)
    arguments = (x, weight, rows.blocks, gate, base, 0.5)
    eager = indexed_combine_reference(*arguments)
    check(found, eager, indexed_combine_reference(*map(exact, arguments)))


@pytest.mark.parametrize("top_k", [1, 3, BLOCKS])
def test_routing_and_its_ties(draw, top_k):
    x, weight = draw(4, 200), draw(BLOCKS, 200, dtype=torch.float32)
    weight[2] = weight[1]
    bias = torch.tensor([0.0, 0.1, 0.1, -3.0, 0.0], device=x.device)
    found, eager = route(x, weight, bias, top_k), route_reference(x, weight, bias, top_k)
    truth = route_reference(exact(x), exact(weight), exact(bias), top_k)
    assert torch.equal(found[1], truth[1]), "ties go to the lower index"
    check(found[0], eager[0], truth[0], "logits")
    torch.testing.assert_close(found[2], eager[2])


@pytest.mark.parametrize("count, blocks", [(1, 1), (17, 1), (40, 5), (96, 14)])
def test_sorting_by_block_is_stable(triton_device, count, blocks):
    generator = torch.Generator().manual_seed(count)
    chosen = torch.randint(blocks, (count,), generator=generator).to(triton_device)
    for found, wanted in zip(
        sort_by_block(chosen, blocks), sort_by_block_reference(chosen, blocks), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dim", [64, 128, 12])
def test_gated_deltanet(draw, triton_device, dim):
    """Three sequences of two rows, the middle one's token padding."""
    heads, inner = 2, 2 * dim
    blocks = torch.tensor([0, 3, 1, 2, 4, 0], device=triton_device)
    active = torch.tensor([1, 0, 1], dtype=torch.int32, device=triton_device)
    exponents = [draw(BLOCKS, heads, dtype=torch.float32) for _ in range(2)]
    inputs = [draw(6, 4 * inner + 2 * heads), [draw(BLOCKS, inner, 4) for _ in range(3)]]
    inputs += [*exponents, draw(BLOCKS, dim)]
    conv = draw(3, BLOCKS, 3 * inner, 3)
    state = draw(3, BLOCKS, heads, dim, dim, dtype=torch.float32)
    states = [[conv.clone(), state.clone()] for _ in range(3)]
    states[2] = exact(states[2])
    found = gated_delta_step(*inputs, *states[0], blocks, active, 1e-6)
    eager = gated_delta_step_reference(*inputs, *states[1], blocks, active, 1e-6)
    truth = gated_delta_step_reference(*exact(inputs), *states[2], blocks, active, 1e-6)
    check(found, eager, truth, "output")
    for name, *three in zip(("conv", "state"), *states, strict=True):
        check(*three, name)
    untouched = torch.ones(3, BLOCKS, dtype=torch.bool)
    untouched[0, [0, 3]] = untouched[2, [4, 0]] = False
    for before, after in ((conv, states[0][0]), (state, states[0][1])):
        assert torch.equal(before[untouched], after[untouched])


@pytest.mark.parametrize("many", [False, True], ids=["few rows", "many rows"])
@pytest.mark.parametrize(
    "rotary_dim, length, filled, settings",
    [(64, 90, 70, "plain"), (16, 3, 0, "plain"), (64, 3, 2, "biases and norms")],
)
def test_attention(
    draw, triton_device, poisoned, monkeypatch, many, rotary_dim, length, filled, settings
):
    """Two slots, grouped heads; entries of other blocks and of padding (-1) between a row's own."""
    if many:
        kernels = importlib.import_module("molcli.kernels.step_attention.triton_kernels")
        monkeypatch.setattr(kernels, "_PROGRAMS", 4)
        monkeypatch.setattr(kernels, "_CHANNELS", 128)  # two programs for four heads
    heads, kv, dim, slots = 2, 1, 64, 2
    blocks = torch.tensor([0, 3, 1, 2], device=triton_device)
    active = torch.tensor([1, 0], dtype=torch.int32, device=triton_device)
    projected = draw(4, (heads + 2 * kv) * dim)
    biases, norms = [], []
    if settings != "plain":
        biases = [draw(BLOCKS, n * dim) for n in (heads, kv, kv)]
        norms = [draw(BLOCKS, dim) for _ in range(2)]
    angle = draw(2, rotary_dim // 2).repeat(1, 2)
    cache_blocks = (torch.arange(2 * length * slots, device=triton_device) * 7 % (BLOCKS + 1)) - 1
    cache_blocks = cache_blocks.view(2, length, slots).int()
    cache = [draw(2, length, slots, kv, dim), draw(2, length, slots, kv, dim), cache_blocks]
    caches = [[x.clone() for x in cache] for _ in range(3)]
    caches[2] = exact(caches[2])
    time = torch.tensor([filled], dtype=torch.int32, device=triton_device)
    inputs = (projected, biases, norms, angle.cos(), angle.sin())
    rest = (time, blocks, active, heads, 1e-6)
    found = step_append(*inputs, *caches[0], *rest)
    eager = step_append_reference(*inputs, *caches[1], *rest)
    truth = step_append_reference(*map(exact, inputs), *caches[2], *rest)
    check(found, eager, truth, "query")
    for name, *three in zip(("keys", "values"), *caches, strict=False):
        check(*three, name)
    assert torch.equal(caches[0][2], caches[2][2])
    assert (caches[0][2][1, filled] == -1).all(), "padding belongs to no block"
    for window in (0, 30):
        checked = step_attend(found, *caches[0], time, blocks, BLOCKS, window)
        reference = step_attend_reference(eager, *caches[1], time, blocks, window)
        wanted = step_attend_reference(truth, *caches[2], time, blocks, window)
        if many:  # nothing is read for the second sequence, whose token is padding
            assert (checked[2:] == 0).all()
            checked, reference, wanted = checked[:2], reference[:2], wanted[:2]
        check(checked, reference, wanted, f"output, window {window}")
    seen = step_attend_reference(truth, *caches[2], time, blocks)
    assert torch.equal(wanted, seen[: len(wanted)]) == (filled < 30)


def test_attention_of_one_block_leaves_out_padding(draw, triton_device):
    blocks = torch.zeros(2, dtype=torch.int64, device=triton_device)
    cache_blocks = torch.zeros(2, 90, 1, dtype=torch.int32, device=triton_device)
    cache_blocks[1, :66] = -1
    q, keys, values = draw(2, 3, 16), draw(2, 90, 1, 3, 16), draw(2, 90, 1, 3, 16)
    inputs = (q, keys, values, cache_blocks, cache_blocks.new_tensor([80]), blocks)
    found, eager = step_attend(*inputs, 1), step_attend_reference(*inputs)
    check(found, eager, step_attend_reference(*map(exact, inputs)))


@pytest.mark.parametrize(
    "slots, heads, kv, dim, window",
    [(1, 9, 3, 64, 0), (1, 2, 1, 12, 30), (2, 4, 2, 64, 0), (2, 3, 3, 16, 20)],
)
def test_attention_of_many_rows(
    draw, triton_device, poisoned, monkeypatch, slots, heads, kv, dim, window
):
    """One program for all query heads of a key-value head."""
    kernels = importlib.import_module("molcli.kernels.step_attention.triton_kernels")
    monkeypatch.setattr(kernels, "_PROGRAMS", 1)
    count = 1 if slots == 1 else BLOCKS
    blocks = torch.tensor([0, 3, 1, 2][: 2 * slots], device=triton_device) % count
    shape = 2, 90, slots
    cache_blocks = torch.arange(180 * slots, device=triton_device) * 7 % (count + 1) - 1
    cache_blocks = cache_blocks.view(shape).int()
    q, keys, values = draw(2 * slots, heads, dim), draw(*shape, kv, dim), draw(*shape, kv, dim)
    for filled in (80, 5):
        time = cache_blocks.new_tensor([filled])
        cache_blocks[:, filled] = blocks.view(2, slots).int()
        if filled == 5:  # the second sequence has ended: its cache is not read
            cache_blocks[1, filled] = -1
        inputs = (q, keys, values, cache_blocks, time, blocks)
        found = step_attend(*inputs, count, window)
        eager = step_attend_reference(*inputs, window)
        truth = step_attend_reference(*map(exact, inputs), window)
        padding = cache_blocks[:, filled].flatten() < 0
        assert (found[padding] == 0).all()
        check(found[~padding], eager[~padding], truth[~padding])
    blind = step_attend(q, keys, values, torch.full_like(cache_blocks, -1), time, blocks, count)
    assert (blind == 0).all()


def test_every_operator_describes_itself_correctly_to_torch_compile():
    """Shapes without data, and which arguments are mutated."""
    blocks = torch.tensor([0, 3, 1, 2])
    order, starts = sort_by_block(blocks, BLOCKS)
    x, weight = torch.randn(2, 24), torch.randn(BLOCKS, 40, 24)
    y, active = torch.randn(4, 40), torch.ones(2, dtype=torch.int32)
    shared = (x, [weight, weight], blocks, order, starts)
    heads = torch.randn(BLOCKS, 2)
    cache = [torch.randn(2, 5, 2, 1, 8), torch.randn(2, 5, 2, 1, 8)]
    cache += [torch.zeros(2, 5, 2, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)]
    angle = torch.randn(2, 8)
    operations = torch.ops.molcli
    calls = [
        (operations.sort_by_block, (blocks, BLOCKS)),
        (operations.route, (x, torch.randn(BLOCKS, 24), torch.zeros(BLOCKS), 3)),
        (operations.indexed_linear, (*shared, None, None, 0.0, None, None, None)),
        (operations.indexed_linear, (*shared, None, None, 0.0, "silu", None, y)),
        (operations.indexed_combine, (y, None, blocks, None, torch.randn(2, 40), 1.0)),
        (
            operations.gated_delta_step,
            (torch.randn(4, 68), [torch.randn(BLOCKS, 16, 4)] * 3, heads, heads)
            + (torch.randn(BLOCKS, 8), torch.randn(2, BLOCKS, 48, 3))
            + (torch.randn(2, BLOCKS, 2, 8, 8), blocks, active, 1e-6),
        ),
        (
            operations.step_append,
            (torch.randn(4, 32), [], [], angle.cos(), angle.sin(), *cache)
            + (blocks, active, 2, 1e-6),
        ),
        (operations.step_attend, (torch.randn(4, 2, 8), *cache, blocks, BLOCKS)),
    ]
    for operation, arguments in calls:
        torch.library.opcheck(operation.default, arguments)
