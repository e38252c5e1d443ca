"""A linear layer per block: what it computes, and how its weights' gradient is summed."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from molcli.kernels.grouped_linear import grouped_linear, grouped_linear_reference
from molcli.kernels.grouped_linear.grouped_product import (
    GroupedProduct,
    grouped_product,
    num_gradient_parts,
    part_offsets,
)
from molcli.kernels.packed_rows import all_rows


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=6), parts=st.integers(1, 9))
def test_the_parts_of_a_block_are_of_even_size(sizes, parts):
    ends = torch.tensor(sizes).cumsum(0).int()
    cut = part_offsets(ends, parts)
    assert cut.dtype == torch.int32
    assert torch.equal(cut[parts - 1 :: parts], ends)
    sizes_of_parts = cut.diff(prepend=cut.new_zeros(1)).view(len(sizes), parts)
    assert sizes_of_parts.min() >= 0
    assert int((sizes_of_parts.amax(1) - sizes_of_parts.amin(1)).max()) <= 1


def test_only_few_tiles_over_many_rows_are_summed_in_parts():
    assert num_gradient_parts(torch.Size([8, 192, 576]), 131_072) == 7
    assert num_gradient_parts(torch.Size([8, 192, 192]), 131_072) == 16
    assert num_gradient_parts(torch.Size([15, 4096, 512]), 98_304) == 1
    assert num_gradient_parts(torch.Size([8, 192, 576]), 8_192) == 3
    assert num_gradient_parts(torch.Size([8, 192, 576]), 2_048) == 1
    assert num_gradient_parts(torch.Size([600, 8, 8]), 10**9) * 600 <= 1024


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("sizes", [[9000, 0, 4000, 1, 7383], [900, 0, 100, 1, 23]])
def test_it_is_as_exact_as_eager_bf16(device, sizes):
    """Sums in parts (the first case) and in one; empty blocks get zeros."""
    generator = torch.Generator(device).manual_seed(0)
    ends = torch.tensor(sizes, device=device).cumsum(0).int()
    rows, shape = sum(sizes), (len(sizes), 64, 32)
    assert (num_gradient_parts(torch.Size(shape), rows) > 1) == (rows > 5000)
    x, w, g = (
        torch.randn(*s, generator=generator, device=device) for s in [(rows, 32), shape, (rows, 64)]
    )
    half = [z.bfloat16().requires_grad_() for z in (x, w)]
    exact = [z.detach().double().requires_grad_() for z in half]

    def run(function, inputs):
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, g.to(out.dtype))]

    fast = run(lambda x, w: GroupedProduct.apply(x, w, ends), half)
    eager = run(lambda x, w: grouped_linear_reference(x, w, ends), half)
    exact_g = run(lambda x, w: grouped_linear_reference(x, w, ends), exact)
    for name, a, e, b in zip(("out", "x", "weight"), fast, eager, exact_g, strict=True):
        error, allowed = (float((z.double() - b).norm() / b.norm()) for z in (a, e))
        print(f"grouped linear, {rows} rows, {name}: {error:.5f} (eager bf16 {allowed:.5f})")
        assert error <= 2 * allowed
    assert not fast[2][1].any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("wide", "deep"), [(6, 64), (64, 12), (2, 5), (16, 16)])
def test_odd_widths_are_padded_for_the_library(monkeypatch, device, wide, deep):
    """The library takes rows of a multiple of 16 bytes, in the backward pass too."""
    plain = F.grouped_mm

    def strict(a, b, *, offs):
        for x in (a, b):
            steps = [step for step in x.stride() if step != 1]
            assert all(step * x.element_size() % 16 == 0 for step in steps), x.stride()
        return plain(a, b, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", strict)
    generator = torch.Generator(device).manual_seed(0)
    ends = torch.tensor([24, 24, 40], device=device).int()
    x, w, g = (
        torch.randn(*shape, generator=generator, device=device).bfloat16()
        for shape in [(40, deep), (3, wide, deep), (40, wide)]
    )
    inputs = [x.requires_grad_(), w.requires_grad_()]
    found = grouped_product(*inputs, ends)
    right = grouped_linear_reference(*inputs, ends)
    pairs = zip(
        [found, *torch.autograd.grad(found, inputs, g)],
        [right, *torch.autograd.grad(right, inputs, g)],
        strict=True,
    )
    for a, b in pairs:
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("blocks", [1, 3])
def test_biases_are_added(blocks):
    """A single block's bias is a vector: cuBLAS would copy a matrix to the output first."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*s, generator=generator, dtype=torch.float64)
        for s in [(5 * blocks, 4), (blocks, 6, 4), (blocks, 6)]
    )
    rows = all_rows(torch.zeros(5, dtype=torch.int64), 1, blocks, 5)
    expected = (weight[rows.blocks] @ x[..., None])[..., 0] + bias[rows.blocks]
    graph = make_fx(lambda x, w, b: grouped_linear(x, w, rows, b))(x, weight, bias)
    torch.testing.assert_close(graph(x, weight, bias), expected)
    added = [n for n in graph.graph.nodes if n.target is torch.ops.aten.addmm.default]
    assert [n.args[0].meta["tensor_meta"].shape for n in added] == [(6,)] * (blocks == 1)
