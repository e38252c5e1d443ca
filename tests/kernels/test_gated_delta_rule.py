import pytest
import torch
import torch.nn.functional as F

from molcli.kernels.gated_delta_rule import (
    gated_delta_rule,
    gated_delta_rule_reference,
    recurrent_gated_delta_rule,
)

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
    for i, (a, b) in enumerate(zip(BOUNDS[:-1], BOUNDS[1:], strict=True)):
        if a == b:
            states.append(state[i])
            continue
        part = (x[None, a:b] for x in (q, k, v, g, beta))
        out, last = recurrent_gated_delta_rule(*part, state[i : i + 1])
        outs.append(out[0])
        states.append(last[0])
    return torch.cat(outs), torch.stack(states)


def with_gradients(function, tensors):
    out, state = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for x in (out, state):
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        loss = loss + (x.double() * weight).sum()
    return [out, state, *torch.autograd.grad(loss, tensors)]


def test_chunks_equal_the_recurrence_with_all_gradients():
    tensors, cu = inputs()
    expected = with_gradients(lambda *x: recurrence(*x), tensors)
    found = with_gradients(lambda *x: gated_delta_rule_reference(*x[:5], cu, x[5]), tensors)
    for name, a, b in zip("out state q k v g beta s0".split(), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_an_empty_segment_keeps_its_state():
    tensors, cu = inputs()
    _, state = gated_delta_rule_reference(*tensors[:5], cu, tensors[5])
    assert torch.equal(state[1], tensors[5][1])


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_gpu_path_is_as_exact_as_bf16_allows(dim):
    tensors, cu = inputs(torch.bfloat16, "cuda", dim=dim)
    length = max(b - a for a, b in zip(BOUNDS[:-1], BOUNDS[1:], strict=True))
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = with_gradients(lambda *x: recurrence(*x), exact)
    fast = with_gradients(lambda *x: gated_delta_rule(*x[:5], cu, length, x[5]), tensors)
    # What bf16 costs: the same recurrence with every operand rounded to bf16 beforehand and the
    # results rounded after, against the exact one on perturbed inputs of one bf16 step.
    nudged = [
        (x.detach().double() * (1 + 2**-8 * torch.randn_like(x.double()))).requires_grad_()
        for x in tensors
    ]
    noise = with_gradients(lambda *x: recurrence(*x), nudged)
    names = "out state q k v g beta s0".split()
    for name, a, n, b in zip(names, fast, noise, expected, strict=True):
        assert a.isfinite().all(), name
        allowed = 2 * (n - b).norm() / b.norm()
        error = (a.double() - b).norm() / b.norm()
        assert error <= allowed, f"{name}: {error:.4f}, bf16 noise allows {allowed:.4f}"
        print(f"gated delta rule, head {dim}, {name}: {error:.4f} (allowed {allowed:.4f})")
