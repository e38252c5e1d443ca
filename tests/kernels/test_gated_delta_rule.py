import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from molcli.kernels.gated_delta_rule import (
    fla_check,
    gated_delta_rule,
    gated_delta_rule_reference,
    recurrent_gated_delta_rule,
)
from molcli.kernels.gated_delta_rule.fla_check import fla_is_correct

# Lengths by the path they take: one token; empty; part of a chunk; exactly one; several and a rest.
BOUNDS = [0, 1, 1, 40, 104, 300]


def inputs(dtype=torch.float64, device="cpu", heads=2, dim=16):
    generator = torch.Generator().manual_seed(0)
    rows = BOUNDS[-1]

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(randn(rows, heads, dim), dim=-1) for _ in range(2))
    v, g = randn(rows, heads, dim), -randn(rows, heads).abs()
    g[10:14] = -30.0  # a state that is all but forgotten must not overflow the chunk's ratios
    beta, state = randn(rows, heads).sigmoid(), randn(len(BOUNDS) - 1, heads, dim, dim)
    tensors = [x.to(device, dtype) for x in (q, k, v)] + [
        x.to(device, torch.promote_types(dtype, torch.float32)) for x in (g, beta, state)
    ]
    return [x.requires_grad_() for x in tensors], torch.tensor(
        BOUNDS, dtype=torch.int32, device=device
    )


def recurrence(q, k, v, g, beta, state):
    outs, states = [], []
    for i, (a, b) in enumerate(itertools.pairwise(BOUNDS)):
        if a == b:
            states.append(state[i])
            continue
        part = (x[None, a:b] for x in (q, k, v, g, beta))
        out, last = recurrent_gated_delta_rule(*part, state[i : i + 1])
        outs.append(out[0])
        states.append(last[0])
    return torch.cat(outs), torch.stack(states)


def with_gradients(function, tensors):
    outputs = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for x in outputs:
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        loss = loss + (x.double() * weight).sum()
    return [*outputs, *torch.autograd.grad(loss, tensors)]


def test_chunks_equal_the_recurrence_with_all_gradients():
    tensors, cu = inputs()
    expected = with_gradients(lambda *x: recurrence(*x), tensors)
    found = with_gradients(lambda *x: gated_delta_rule_reference(*x[:5], cu, x[5]), tensors)
    for name, a, b in zip(
        ["out", "state", "q", "k", "v", "g", "beta", "s0"], found, expected, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_an_empty_segment_keeps_its_state():
    tensors, cu = inputs()
    _, state = gated_delta_rule_reference(*tensors[:5], cu, tensors[5])
    assert torch.equal(state[1], tensors[5][1])


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("path", ["training", "decoding"])
def test_gpu_path_is_as_exact_as_bf16_allows(dim, path):
    """training: gradients, states from zero. decoding: outputs and states, states given.

    Allowed is twice the error of the recurrence itself in bf16.
    """
    tensors, cu = inputs(torch.bfloat16, "cuda", dim=dim)
    assert fla_is_correct(0, dim)
    length = max(b - a for a, b in itertools.pairwise(BOUNDS))
    training = path == "training"

    def results(function, given):
        *rest, state = given
        if training:
            return with_gradients(lambda *x: (function(*x, torch.zeros_like(state))[0],), rest)
        with torch.no_grad():
            return list(function(*given))

    exact = [x.detach().double().requires_grad_() for x in tensors]
    half = [x.detach().bfloat16().requires_grad_() for x in tensors]
    expected, eager = results(recurrence, exact), results(recurrence, half)
    fast = results(lambda *x: gated_delta_rule(*x[:5], cu, length, x[5]), tensors)
    names = ["out", "q", "k", "v", "g", "beta"] if training else ["out", "state"]
    report = []
    for name, a, n, b in zip(names, fast, eager, expected, strict=True):
        assert a.isfinite().all(), name
        error, allowed = ((x.double() - b).norm() / b.norm() for x in (a, n))
        report.append((name, round(error.item(), 4), round(2 * allowed.item(), 4)))
    print(f"gated delta rule, head {dim}, {path}: error, allowed", report)
    assert all(error <= allowed for _, error, allowed in report)


@pytest.mark.gpu
def test_the_check_may_run_inside_a_checkpoint():
    """The first forward pass of all runs it, and the second one must save the same tensors."""
    fla_check._fla_is_correct.cache_clear()
    tensors, cu = inputs(torch.bfloat16, "cuda", dim=64)
    length = max(b - a for a, b in itertools.pairwise(BOUNDS))

    def rule(*given):
        return gated_delta_rule(*given, cu, length, None)[0]

    plain = with_gradients(lambda *x: (rule(*x),), tensors[:5])
    fla_check._fla_is_correct.cache_clear()

    def checkpointed(*given):
        with torch.autocast("cuda", torch.bfloat16):
            return (checkpoint(rule, *given, use_reentrant=False),)

    for a, b in zip(with_gradients(checkpointed, tensors[:5]), plain, strict=True):
        assert torch.equal(a, b)
