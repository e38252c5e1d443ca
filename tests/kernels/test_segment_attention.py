import pytest
import torch

from molcli.kernels.rows import routed_rows
from molcli.kernels.segment_attention import segment_attention, segment_attention_reference
from molcli.kernels.segment_attention.reference import PADDED


def case(device="cpu", dtype=torch.float64, heads=4, kv=2, dim=16, n=70, ends=(25, 50)):
    """ends: of the documents but the last."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(n)])
    chosen[chosen == 3] = 4  # block 3 stays empty; block 4 may hold a token twice
    chosen = chosen[chosen[:, 0] != chosen[:, 1]]
    document = (torch.arange(len(chosen))[:, None] >= torch.tensor(ends)).sum(1).to(device)
    rows = routed_rows(chosen.to(device), document, int(document[-1]) + 1, 5, n)
    sizes = [(heads, dim), (kv, dim), (kv, dim)]
    tensors = [
        torch.randn(len(rows.tokens), *s, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for s in sizes
    ]
    return tensors, rows


def naive(q, k, v, segments):
    """One (M, M) mask, scores in full."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    seen = (segments[:, None] == segments[None]).tril()
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


# One document, and several of which padding to the longest segment would be most.
@pytest.mark.parametrize("ends", [(), (25, 50), (1, 3, 4, 8, 10, 12, 14, 60)])
def test_reference_equals_a_full_mask_with_gradients(ends):
    tensors, rows = case(ends=ends)
    longest = int(rows.cu_seqlens.diff().max())
    assert ((len(rows.cu_seqlens) - 1) * longest > PADDED * len(rows.tokens)) == (len(ends) > 0)
    weight = torch.randn_like(tensors[0])
    pairs = []
    for function in (
        lambda q, k, v: segment_attention_reference(q, k, v, rows.cu_seqlens),
        lambda q, k, v: naive(q, k, v, rows.segments),
    ):
        out = function(*tensors)
        pairs.append([out, *torch.autograd.grad((out * weight).sum(), tensors)])
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_gpu_path_is_as_exact_as_eager_bf16():
    tensors, rows = case("cuda", torch.bfloat16, dim=64, n=900)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    weight = torch.randn_like(exact[0])

    def run(function, inputs):
        out = function(*inputs)
        return [out, *torch.autograd.grad((out.double() * weight).sum(), inputs)]

    expected = run(lambda *x: naive(*x, rows.segments), exact)
    eager = run(lambda *x: naive(*x, rows.segments), tensors)
    fast = run(lambda *x: segment_attention(*x, rows), tensors)
    for a, e, b in zip(fast, eager, expected, strict=True):
        error, allowed = ((x.double() - b).norm() / b.norm() for x in (a, e))
        assert error <= 2 * allowed
        print(f"segment attention: {error:.5f} (eager bf16 {allowed:.5f})")
