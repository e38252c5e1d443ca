"""The router's logits and their gradients, compiled or interpreted, against float64."""

import pytest
import torch

from molcli.kernels.route import select_blocks
from molcli.kernels.router_logits import MAX_BLOCKS, router_logits, router_logits_reference
from molcli.model.routing.router import Router


def case(device, dtype, rows, width, blocks):
    """x with rows of very different norms, as residuals have; a weight; the logits' gradient."""
    generator = torch.Generator().manual_seed(rows + blocks)
    x = torch.randn(rows, width, generator=generator)
    x = x * torch.logspace(-1, 2, rows)[:, None]
    weight = torch.randn(blocks, width, generator=generator)
    grad = torch.randn(rows, blocks, generator=generator)
    return x.to(device, dtype), weight.to(device), grad.to(device)


def with_gradients(function, x, weight, grad):
    x, weight = (z.detach().requires_grad_() for z in (x, weight))
    logits = function(x, weight)
    return [logits, *torch.autograd.grad(logits, [x, weight], grad.to(logits.dtype))]


# 300 rows are several partial sums of a weight's gradient; 200 channels end inside a tile.
@pytest.mark.parametrize("triton_device", ["cpu"], indirect=True, ids=["interpreted"])
@pytest.mark.parametrize(
    "rows, width, blocks, dtype",
    [
        (1, 64, 8, torch.float16),
        (17, 200, 14, torch.float16),
        (300, 72, 1, torch.float32),
        (17, 100, 16, torch.float32),
        (17, 72, 31, torch.float32),
    ],
)
def test_interpreted_kernels(triton_device, poisoned, check, rows, width, blocks, dtype):
    compare(check, case(triton_device, dtype, rows, width, blocks))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "blocks, dtype",
    [
        (1, torch.bfloat16),
        (8, torch.float32),
        (14, torch.bfloat16),
        (14, torch.float32),
        (16, torch.float16),
        (31, torch.float32),
    ],
)
@pytest.mark.parametrize("rows", [1, 17, 300, 70_000])
def test_gpu_kernels(check, rows, blocks, dtype):
    """70,000 rows are more than 512 partial sums of 128."""
    compare(check, case("cuda", dtype, rows, 200, blocks))


def compare(check, given):
    found = with_gradients(router_logits, *given)
    eager = with_gradients(router_logits_reference, *given)
    truth = with_gradients(router_logits_reference, *(z.double() for z in given))
    check("logits dx dw", found, eager, truth)
    again = with_gradients(router_logits, *given)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    bias = torch.linspace(-0.1, 0.1, given[1].shape[0], device=given[1].device)
    chosen, expected = (select_blocks(z[0], bias, min(3, len(bias)))[0] for z in (found, eager))
    # Rounding decides between logits that differ by less than it: one row of 10,000, if any.
    assert (chosen != expected).any(1).sum() <= len(chosen) // 10_000


@pytest.mark.parametrize("triton_device", ["cpu"], indirect=True, ids=["interpreted"])
def test_operator_keeps_its_contracts(triton_device, check):
    """Schema, shapes unknown to the compiler, gradients through it; slices of rows, no rows."""
    x, weight, grad = case(triton_device, torch.float16, 3, 40, 5)
    inputs = [z.detach().requires_grad_() for z in (x[:, :20], weight[:, :20])]
    torch.library.opcheck(torch.ops.molcli.router_logits.default, tuple(inputs))
    compare(check, (x[:, :20], weight[:, :20], grad))
    none = with_gradients(router_logits, x[:0], weight, grad[:0])
    assert [z.shape for z in none] == [(0, 5), (0, 40), (5, 40)] and not none[2].any()


def test_which_inputs_take_the_kernels(triton_device):
    for dtype, blocks, uses_kernel in [
        (torch.float32, MAX_BLOCKS, True),
        (torch.float32, MAX_BLOCKS + 1, False),
        (torch.float64, 2, False),
    ]:
        x, weight, _ = case(triton_device, torch.float32, 2, 16, blocks)
        router = Router(16, blocks, 2).to(triton_device, dtype)
        with torch.no_grad():
            router.weight.copy_(weight)
        with torch.autocast(triton_device, torch.bfloat16):
            routing = router(x.to(dtype))
        assert ("molcli" in routing.logits.grad_fn.name()) == uses_kernel
        assert routing.logits.dtype == routing.weights.dtype == dtype
        expected = router_logits_reference(x.double(), weight.double())
        torch.testing.assert_close(routing.logits.double(), expected, rtol=1e-5, atol=1e-5)
