"""The short convolution of q, k and v, compiled or interpreted, against its reference."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from molcli.kernels.packed_rows import routed_rows
from molcli.kernels.qkv_conv import qkv_conv, qkv_conv_reference, short_conv, short_conv_state

HEADS = 2


def example(dim, dtype, device="cpu", tokens=200, blocks=4):
    """Two documents; block 2 is empty, block 3 has one row, block 0 more than a program takes."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.zeros(tokens, 1, dtype=torch.int64)
    chosen[::3] = 1
    chosen[7] = 3
    document = (torch.arange(tokens) >= 120).long()
    rows = routed_rows(chosen.to(device), document.to(device), 2, blocks, tokens)
    channels = 3 * HEADS * dim
    joint = torch.randn(tokens, channels + 5, generator=generator, dtype=torch.float64)
    weights = torch.randn(3, blocks, HEADS * dim, 4, generator=generator, dtype=torch.float64)
    state = torch.randn(2 * blocks, channels, 3, generator=generator, dtype=torch.float64)
    x, *rest = (z.to(device, dtype) for z in (joint, *weights, state))
    return rows, x[:, :channels], tuple(rest[:3]), rest[3]


def reference(rows, x, weights, state, dim):
    weight = torch.cat(weights, dim=1)[rows.blocks]
    return qkv_conv_reference(x, weight, rows.segments, rows.index_in_segment, state, dim)


def gradients(function, tensors):
    tensors = [z.detach().requires_grad_() for z in tensors]
    outputs = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for out in outputs:
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        loss = loss + (out.double() * weight.to(out.device)).sum()
    return list(outputs), list(torch.autograd.grad(loss, tensors))


def test_ragged_convolution_equals_one_convolution_per_segment():
    torch.manual_seed(0)
    bounds, channels, width = [0, 1, 1, 3, 12], 5, 4
    x = torch.randn(12, channels, dtype=torch.float64)
    weights = torch.randn(4, channels, width, dtype=torch.float64)
    state = torch.randn(4, channels, width - 1, dtype=torch.float64)
    segment = torch.tensor([0, 2, 2, *[3] * 9])
    cu = torch.tensor(bounds, dtype=torch.int32)
    index = torch.arange(12) - cu[segment]
    found = short_conv(x, weights[segment], segment, index, state)
    last = short_conv_state(x, cu, state)
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        history = torch.cat([state[i], x[a:b].T], dim=1)
        assert torch.equal(last[i], history[:, -(width - 1) :])
        if b > a:
            expected = F.conv1d(history[None], weights[i][:, None], groups=channels)[0].T
            torch.testing.assert_close(found[a:b], expected)


def test_without_a_state_the_past_is_zero():
    x, weight = torch.randn(6, 3), torch.randn(1, 3, 4)
    index = torch.arange(6)
    zero = torch.zeros(1, 3, 3)
    start = torch.zeros(6, dtype=torch.long)
    assert torch.equal(
        short_conv(x, weight, start, index, None), short_conv(x, weight, start, index, zero)
    )


@pytest.mark.parametrize("triton_device", ["cpu"], indirect=True, ids=["interpreted"])
@pytest.mark.parametrize("dim", [24])
@pytest.mark.parametrize("with_state", [False, True])
def test_interpreted_kernel_equals_the_reference(triton_device, dim, with_state):
    pytest.importorskip("triton")
    from molcli.kernels.qkv_conv.triton_kernels import forward

    rows, x, weights, state = example(dim, torch.float32)
    given = state if with_state else None
    found = forward(x, weights, rows.index_in_segment, rows.offsets, rows.segments, given, dim)
    for a, b in zip(found, reference(rows, x, weights, given, dim), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("triton_device", ["cpu"], indirect=True, ids=["interpreted"])
@pytest.mark.parametrize("dim", [24])
def test_interpreted_gradients_equal_autograd(triton_device, dim):
    pytest.importorskip("triton")
    from molcli.kernels.qkv_conv.triton_kernels import backward

    rows, x, weights, _ = example(dim, torch.float32)
    generator = torch.Generator().manual_seed(1)
    double = [z.double() for z in (x, *weights)]
    _, expected = gradients(lambda x, *w: reference(rows, x, w, None, dim), double)
    shape = (x.shape[0], HEADS, dim)
    given = tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).float() for _ in range(3)
    )
    found = backward(x, weights, rows.index_in_segment, rows.offsets, dim, given)
    for a, b in zip(found, expected, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_gpu_kernel_is_as_exact_as_bf16_allows(dim):
    """Allowed is the error of elementary operations in bf16, for outputs and all gradients.

    The filters are float32, as master weights are.
    """
    rows, x, weights, _ = example(dim, torch.bfloat16, "cuda")
    weights = [w.float() for w in weights]

    def fast(x, *w):
        return qkv_conv(x, w, rows, rows.segments, rows.index_in_segment, None, dim)

    def eager(x, *w):
        return reference(rows, x, w, None, dim)

    exact = [z for part in gradients(eager, [z.double() for z in (x, *weights)]) for z in part]
    rounded = [x, *(w.bfloat16() for w in weights)]
    half = [z for part in gradients(eager, rounded) for z in part]
    found = [z for part in gradients(fast, [x, *weights]) for z in part]
    report = []
    for name, a, n, b in zip(
        ["q", "k", "v", "dx", "dq", "dk", "dv"], found, half, exact, strict=True
    ):
        error, allowed = (((z.double() - b).norm() / b.norm()).item() for z in (a, n))
        report.append((name, round(error, 4), round(allowed, 4)))
        assert error <= 1.1 * allowed, report
    print(f"qkv convolution, head {dim}: error, eager bf16", report)
