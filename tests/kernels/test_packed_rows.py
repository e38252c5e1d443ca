"""Layouts of rows: which token each row holds, and gathers and sums with their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molcli.kernels.gated_delta_rule import gated_delta_rule
from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.packed_rows import all_rows, routed_rows, selected_rows
from molcli.kernels.qkv_conv import qkv_conv
from molcli.kernels.segment_attention import segment_attention


def random_documents(n, generator):
    return torch.randint(0, 2, (n,), generator=generator).cumsum(0)


@st.composite
def routings(draw):
    n = draw(st.integers(1, 30))
    blocks = draw(st.integers(1, 5))
    k = draw(st.integers(1, blocks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    routed = torch.stack([torch.randperm(blocks, generator=generator)[:k] for _ in range(n)])
    document = random_documents(n, generator)
    return routed, document, int(document[-1]) + 1, blocks


@st.composite
def selections(draw):
    """Some of the tokens, from none to all."""
    n = draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count = draw(st.sampled_from([0, 1, n // 2, n]))
    selected = torch.randperm(n, generator=generator)[:count].sort().values
    document = random_documents(n, generator)
    return selected, document, int(document[-1]) + 1


def check_segments(rows, document, expected):
    """expected: (block, document, token) of every row, in order."""
    columns = (rows.blocks, document[rows.tokens], rows.tokens)
    assert list(zip(*(x.tolist() for x in columns), strict=True)) == expected
    counts = [sum(b <= i for b, _, _ in expected) for i in range(rows.num_blocks)]
    assert rows.offsets.tolist() == counts
    for segment, (a, b) in enumerate(zip(rows.cu_seqlens[:-1], rows.cu_seqlens[1:], strict=True)):
        assert (rows.segments[a:b] == segment).all()
        assert rows.index_in_segment[a:b].tolist() == list(range(int(b - a)))
    assert int(rows.cu_seqlens[-1]) == len(expected)


def check_operations(rows, num_tokens):
    """Gathers and sums and their gradients, in float64, against a loop over rows."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    places = list(zip(rows.tokens.tolist(), rows.slots.tolist(), strict=True))
    # Where each row's value comes from, or for `combine` goes to.
    tokens = [(token,) for token, _ in places]
    x, per_slot = randn(num_tokens, 3), randn(num_tokens, rows.num_slots)
    for function, inputs, sources in (
        (rows.gather, x, tokens),
        (rows.gather_per_slot, per_slot, places),
    ):
        inputs.requires_grad_()
        found = function(inputs)
        weight = randn(*found.shape)
        expected, grad = torch.zeros_like(found), torch.zeros_like(inputs)
        for row, source in enumerate(sources):
            expected[row] = inputs.detach()[source]
            grad[source] += weight[row]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, inputs, weight)[0], grad)
    per_row, weight = randn(len(places), 3).requires_grad_(), randn(num_tokens, 3)
    found = rows.combine(per_row)
    expected, grad = torch.zeros(num_tokens, 3).double(), torch.zeros_like(per_row)
    for row, (token, _) in enumerate(places):
        expected[token] += per_row.detach()[row]
        grad[row] = weight[token]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, per_row, weight)[0], grad)
    assert not found[sorted(set(range(num_tokens)) - set(rows.tokens.tolist()))].any()


@settings(deadline=None, max_examples=60)
@given(routings())
def test_a_block_sees_the_tokens_routed_to_it_in_their_order(case):
    routed, document, documents, blocks = case
    rows = routed_rows(routed, document, documents, blocks, 30)
    expected = [
        (block, int(document[token]), token)
        for block in range(blocks)
        for token in range(len(routed))
        if block in routed[token]
    ]
    check_segments(rows, document, expected)
    check_operations(rows, len(routed))


@settings(deadline=None, max_examples=60)
@given(routings())
def test_combine_undoes_gather(case):
    routed, document, documents, blocks = case
    rows = routed_rows(routed, document, documents, blocks, 30)
    x = torch.randn(len(routed), 3, dtype=torch.float64)
    assert torch.equal(rows.combine(rows.gather(x)) / rows.num_slots, x) or torch.allclose(
        rows.combine(rows.gather(x)), x * rows.num_slots
    )
    slot_values = rows.slots[:, None].double()
    total = rows.combine(slot_values)
    assert (total == sum(range(rows.num_slots))).all(), "each token has one row per slot"


@settings(deadline=None, max_examples=60)
@given(selections())
def test_selected_tokens_have_one_row_and_the_others_none(case):
    selected, document, documents = case
    rows = selected_rows(selected, document, documents, 30)
    check_segments(rows, document, [(0, int(document[t]), t) for t in selected.tolist()])
    check_operations(rows, len(document))
    alone = all_rows(document[selected], documents, 1, 30)
    for name in ("blocks", "offsets", "segments", "cu_seqlens"):
        assert torch.equal(getattr(rows, name), getattr(alone, name)), name


@settings(deadline=None, max_examples=40)
@given(routings(), st.data())
def test_neighbouring_blocks_are_a_layout_of_their_own(case, data):
    """In which a token has from none to all of its rows."""
    routed, document, documents, blocks = case
    rows = routed_rows(routed, document, documents, blocks, 30)
    first = data.draw(st.integers(0, blocks - 1))
    count = data.draw(st.integers(1, blocks - first))
    part = rows.block_range(first, count)
    inside = (rows.blocks >= first) & (rows.blocks < first + count)
    assert torch.equal(part.tokens, rows.tokens[inside])
    assert torch.equal(part.blocks, rows.blocks[inside] - first)
    assert part.offsets.tolist()[-1] == int(inside.sum())
    assert part.cu_seqlens.tolist()[-1] == int(inside.sum())
    ones = part.combine(torch.ones(len(part.tokens), 1))
    assert torch.equal(ones[:, 0], ((routed >= first) & (routed < first + count)).sum(1).float())
    check_operations(part, len(routed))


@settings(deadline=None, max_examples=40)
@given(routings(), st.data())
def test_the_rows_of_the_first_tokens_are_those_of_a_shorter_stream(case, data):
    routed, document, documents, blocks = case
    rows = routed_rows(routed, document, documents, blocks, 30)
    count = data.draw(st.integers(1, len(routed)))
    found, kept = rows.first_tokens(count)
    wanted = routed_rows(routed[:count], document[:count], documents, blocks, 30)
    names = ("tokens", "slots", "blocks", "offsets", "segments", "cu_seqlens", "rows_of_token")
    for name in names:
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert torch.equal(rows.tokens[kept], found.tokens)
    assert found.complete


@settings(deadline=None, max_examples=40)
@given(selections(), st.data())
def test_the_first_tokens_of_a_selection_are_a_selection(case, data):
    selected, document, documents = case
    count = data.draw(st.integers(1, len(document)))
    found, _ = selected_rows(selected, document, documents, 30).first_tokens(count)
    wanted = selected_rows(selected[selected < count], document[:count], documents, 30)
    for name in ("tokens", "segments", "cu_seqlens", "rows_of_token"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    check_operations(found, count)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_values_per_block_reach_their_rows_and_gradients_are_sums_over_rows(num_blocks):
    rows = all_rows(torch.zeros(4, dtype=torch.int64), 1, num_blocks, 4)
    x = torch.randn(num_blocks, 2, dtype=torch.float64, requires_grad=True)
    found = rows.gather_per_block(x).expand(len(rows.tokens), 2)
    assert torch.equal(found, x[rows.blocks])
    weight = torch.randn(len(rows.tokens), 2, dtype=torch.float64)
    grad = torch.autograd.grad(found, x, weight)[0]
    torch.testing.assert_close(grad, weight.unflatten(0, (num_blocks, 4)).sum(1))


def test_kernels_take_an_empty_selection():
    document = torch.tensor([0, 0, 1])
    rows = selected_rows(document[:0], document, 2, 3)
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(1, 24, 8, requires_grad=True)
    joint = grouped_linear(rows.gather(x), weight, rows)
    filters = [torch.randn(1, 8, 4) for _ in range(3)]
    index = rows.index_in_segment
    q, k, v = qkv_conv(joint, (filters[0], filters[1], filters[2]), rows, index, index, None, 4)
    g = beta = torch.zeros(0, 2)
    read, _ = gated_delta_rule(q, k, v, g, beta, rows.cu_seqlens, 3, None)
    out = rows.combine((read + segment_attention(q, k, v, rows)).flatten(1))
    assert out.shape == (3, 8) and not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (x, weight)))


def test_all_rows_holds_every_token_in_every_block():
    document = torch.tensor([0, 0, 1])
    rows = all_rows(document, 2, 2, 3)
    assert rows.tokens.tolist() == [0, 1, 2, 0, 1, 2]
    assert rows.cu_seqlens.tolist() == [0, 2, 3, 5, 6]
    assert rows.rows_of_token.tolist() == [[0, 3], [1, 4], [2, 5]]
