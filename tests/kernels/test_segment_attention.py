from dataclasses import replace

import pytest
import torch

from molcli.kernels.packed_rows import routed_rows
from molcli.kernels.segment_attention import segment_attention, segment_attention_reference
from molcli.kernels.segment_attention.reference import MAX_PADDED_RATIO
from molcli.kernels.segments import longest_segment, pad_segments, unpad_segments


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


def naive(q, k, v, segments, window=None, time=None):
    """All scores, with one (M, M) mask."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    seen = (segments[:, None] == segments[None]).tril()
    if window is not None:
        seen &= time[:, None] - time[None] < window
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


# One document, and several, where most rows would be padding if all segments were padded.
@pytest.mark.parametrize("ends", [(), (25, 50), (1, 3, 4, 8, 10, 12, 14, 60)])
def test_reference_equals_a_full_mask_with_gradients(ends):
    tensors, rows = case(ends=ends)
    padded_rows = (len(rows.cu_seqlens) - 1) * int(rows.cu_seqlens.diff().max())
    assert (padded_rows > MAX_PADDED_RATIO * len(rows.tokens)) == (len(ends) > 0)
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


def test_reference_takes_no_rows_at_all():
    cu = torch.zeros(4, dtype=torch.int32)
    q, k, v = (torch.zeros(0, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = segment_attention_reference(q, k, v, cu)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [x.shape for x in (out, *grads)] == [x.shape for x in (q, q, k, v)]


@pytest.mark.parametrize("ends", [(), (25, 50), (1, 3, 4, 8, 10, 12, 14, 60)])
def test_a_window_counts_time_not_rows(ends):
    """Blocks skip tokens, so the rows of a segment are of times that are apart."""
    tensors, rows = case(ends=ends)
    time, weight = rows.tokens, torch.randn_like(tensors[0])
    found, wanted, unlimited = (
        with_gradients(function, tensors, weight)
        for function in (
            lambda *x: segment_attention(*x, rows, 7, time),
            lambda *x: naive(*x, rows.segments, 7, time),
            lambda *x: segment_attention(*x, rows),
        )
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(found[0], unlimited[0])


def joint(lengths, heads, kv, dim, dtype, device="cpu"):
    """Slices of one projection, a gradient, and the layout of segments of these lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(lengths, dtype=torch.int64)
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    segments = torch.arange(len(lengths)).repeat_interleave(lengths)
    shape = (int(cu[-1]), heads + 2 * kv, dim)
    projected = torch.randn(shape, generator=generator).to(device, dtype)
    weight = torch.randn(shape, generator=generator)[:, :heads].to(device, dtype)
    return projected.split([heads, kv, kv], 1), weight, segments.to(device), cu.to(device)


def padded(q, k, v, cu):
    """All scores, of segments that are padded to one length."""
    rows, group, length = len(q), q.shape[1] // k.shape[1], longest_segment(cu)
    q, k, v = (pad_segments(x, cu, length) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("sihd,sjhd->shij", q, k) * q.shape[-1] ** -0.5
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return unpad_segments(torch.einsum("shij,sjhd->sihd", weights, v), cu, rows)


def with_gradients(function, tensors, weight):
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, weight.to(out.dtype))]


@pytest.mark.parametrize("triton_device", ["cpu"], indirect=True, ids=["interpreted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "heads, kv, dim, lengths",
    [
        (3, 1, 16, [5, 0, 1, 68, 3, 0, 0, 9, 1]),  # one longer than two tiles, a ragged end
        (2, 2, 32, [16, 15, 1, 0]),  # segments end where tiles do
        (4, 2, 16, [33]),
    ],
)
def test_short_segment_kernels_equal_a_full_mask(
    triton_device, poisoned, check, heads, kv, dim, lengths, dtype
):
    """With tiles of 32 rows and steps of 16."""
    from molcli.kernels.segment_attention.triton_kernels import backward, forward

    tensors, weight, segments, cu = joint(lengths, heads, kv, dim, dtype)
    out, lse = forward(*tensors, segments, cu, tile=32, step=16)
    found = [out, *backward(*tensors, out, lse, segments, cu, weight, tile=32, step=16)]
    eager, truth = (
        with_gradients(lambda *x: naive(*x, segments), inputs, weight)
        for inputs in (tensors, [x.double() for x in tensors])
    )
    check("out dq dk dv", found, eager, truth)


@pytest.mark.parametrize("triton_device", ["cpu"], indirect=True, ids=["interpreted"])
def test_the_operator_for_short_segments_keeps_its_contracts(triton_device):
    """Schema, shapes unknown to the compiler, gradients through it; and no rows at all."""
    tensors, _, segments, cu = joint([3, 1], 2, 1, 16, torch.float16)
    inputs = [x.detach().requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.molcli.short_segment_attention.default, (*inputs, segments, cu))
    tensors, weight, segments, cu = joint([0, 0], 3, 1, 16, torch.float16)
    out, lse = torch.ops.molcli.short_segment_attention(*tensors, segments, cu)
    backward = torch.ops.molcli.short_segment_attention_backward
    grads = backward(*tensors, out, lse, segments, cu, weight)
    assert [x.shape for x in (out, *grads)] == [x.shape for x in (weight, *tensors)]


def test_short_segments_take_their_own_kernels(triton_device, check):
    half = torch.bfloat16 if triton_device == "cuda" else torch.float16
    tensors, rows = case(triton_device, half, heads=3, kv=1, n=60)
    weight = torch.randn_like(tensors[0])
    found = with_gradients(lambda *x: segment_attention(*x, rows), tensors, weight)
    assert "short_segment_attention" in found[0].grad_fn.name()
    eager, truth = (
        with_gradients(lambda *x: naive(*x, rows.segments), inputs, weight)
        for inputs in (tensors, [x.double() for x in tensors])
    )
    check("out dq dk dv", found, eager, truth)


@pytest.mark.gpu
def test_gpu_window_is_as_exact_as_eager_bf16(check):
    """Three segments of all 300 tokens: FlashAttention's window."""
    tensors, weight, segments, cu = joint([300] * 3, 3, 1, 64, torch.bfloat16, "cuda")
    time = torch.arange(300, device="cuda").repeat(3)
    _, rows = case("cuda")
    rows = replace(rows, segments=segments, cu_seqlens=cu, max_seqlen=300, equal_lengths=True)
    found = with_gradients(lambda *x: segment_attention(*x, rows, 50, time), tensors, weight)
    eager, truth = (
        with_gradients(lambda *x: naive(*x, segments, 50, time), inputs, weight)
        for inputs in (tensors, [x.double() for x in tensors])
    )
    check("out dq dk dv", found, eager, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("longest", [512, 2048], ids=["short", "flash"])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_gpu_path_is_as_exact_as_eager_bf16(check, longest, dim):
    """3,568 segments of up to 73 rows, as when 65,536 tokens visit two blocks each."""
    lengths = torch.randint(0, 74, (3568,), generator=torch.Generator().manual_seed(0))
    tensors, weight, segments, cu = joint(lengths.tolist(), 3, 1, dim, torch.bfloat16, "cuda")
    _, rows = case("cuda")
    rows = replace(rows, segments=segments, cu_seqlens=cu, max_seqlen=longest)

    def fast(*x):
        return segment_attention(*x, rows)

    found = with_gradients(fast, tensors, weight)
    assert ("short_segment_attention" in found[0].grad_fn.name()) == (longest == 512)
    eager, truth = (
        with_gradients(lambda *x: padded(*x, cu), inputs, weight)
        for inputs in (tensors, [x.double() for x in tensors])
    )
    check("out dq dk dv", found, eager, truth)
    if longest == 512:
        again = with_gradients(fast, tensors, weight)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
