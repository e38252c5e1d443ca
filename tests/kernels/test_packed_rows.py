import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molcli.kernels.packed_rows import (
    all_rows,
    chunk_table,
    pad_segments,
    routed_rows,
    unpad_segments,
)


@st.composite
def routings(draw):
    n = draw(st.integers(1, 30))
    blocks = draw(st.integers(1, 5))
    k = draw(st.integers(1, blocks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    chosen = torch.stack([torch.randperm(blocks, generator=generator)[:k] for _ in range(n)])
    document = torch.randint(0, 2, (n,), generator=generator).cumsum(0)
    return chosen, document, int(document[-1]) + 1, blocks


@settings(deadline=None, max_examples=60)
@given(routings())
def test_a_block_sees_the_tokens_that_chose_it_in_their_order(case):
    chosen, document, documents, blocks = case
    rows = routed_rows(chosen, document, documents, blocks, 30)
    expected = [
        (block, int(document[token]), token)
        for block in range(blocks)
        for token in range(len(chosen))
        if block in chosen[token]
    ]
    found = list(
        zip(rows.blocks.tolist(), document[rows.tokens].tolist(), rows.tokens.tolist(), strict=True)
    )
    assert found == expected
    assert rows.offsets.tolist() == [sum(b <= i for b, _, _ in expected) for i in range(blocks)]
    for segment, (a, b) in enumerate(zip(rows.cu_seqlens[:-1], rows.cu_seqlens[1:], strict=True)):
        assert (rows.segments[a:b] == segment).all()
        assert rows.index_in_segment[a:b].tolist() == list(range(int(b - a)))


@settings(deadline=None, max_examples=60)
@given(routings())
def test_combine_undoes_gather(case):
    chosen, document, documents, blocks = case
    rows = routed_rows(chosen, document, documents, blocks, 30)
    x = torch.randn(len(chosen), 3, dtype=torch.float64)
    assert torch.equal(rows.combine(rows.gather(x)) / rows.num_slots, x) or torch.allclose(
        rows.combine(rows.gather(x)), x * rows.num_slots
    )
    slot_values = rows.slots[:, None].double()
    total = rows.combine(slot_values)
    assert (total == sum(range(rows.num_slots))).all(), "each token has one row per slot"


@settings(deadline=None, max_examples=40)
@given(routings(), st.data())
def test_neighbouring_blocks_are_a_layout_of_their_own(case, data):
    chosen, document, documents, blocks = case
    rows = routed_rows(chosen, document, documents, blocks, 30)
    first = data.draw(st.integers(0, blocks - 1))
    count = data.draw(st.integers(1, blocks - first))
    part = rows.of_blocks(first, count)
    inside = (rows.blocks >= first) & (rows.blocks < first + count)
    assert torch.equal(part.tokens, rows.tokens[inside])
    assert torch.equal(part.blocks, rows.blocks[inside] - first)
    assert part.offsets.tolist()[-1] == int(inside.sum())
    assert part.cu_seqlens.tolist()[-1] == int(inside.sum())
    ones = part.scatter(torch.ones(len(part.tokens), 1), len(chosen))
    assert torch.equal(ones[:, 0], ((chosen >= first) & (chosen < first + count)).sum(1).float())


@settings(deadline=None, max_examples=40)
@given(routings(), st.data())
def test_the_rows_of_the_first_tokens_are_those_of_a_shorter_stream(case, data):
    chosen, document, documents, blocks = case
    rows = routed_rows(chosen, document, documents, blocks, 30)
    count = data.draw(st.integers(1, len(chosen)))
    found, kept = rows.of_first_tokens(count)
    wanted = routed_rows(chosen[:count], document[:count], documents, blocks, 30)
    for name in ("tokens", "slots", "blocks", "offsets", "segments", "cu_seqlens"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert torch.equal(rows.tokens[kept], found.tokens)


def test_all_rows_holds_every_token_in_every_block():
    document = torch.tensor([0, 0, 1])
    rows = all_rows(document, 2, 2, 3)
    assert rows.tokens.tolist() == [0, 1, 2, 0, 1, 2]
    assert rows.cu_seqlens.tolist() == [0, 2, 3, 5, 6]
    assert rows.of_token.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_padding_segments_is_undone_and_leaves_zeros():
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    x = torch.randn(5, 2)
    padded = pad_segments(x, cu, 3)
    assert torch.equal(padded[0, :2], x[:2]) and torch.equal(padded[2], x[2:])
    assert padded[1].count_nonzero() == 0 and padded[0, 2].count_nonzero() == 0
    assert torch.equal(unpad_segments(padded, cu, 5), x)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    size=st.integers(1, 4),
)
def test_chunks_cover_every_row_once_and_spare_lines_none(lengths, size):
    cu = torch.tensor([0, *itertools.accumulate(lengths)])
    rows = int(cu[-1])
    table = chunk_table(cu, rows, size)
    assert table.shape == (rows // size + len(lengths), 2)
    covered = []
    for segment, place in table.tolist():
        begin, end = int(cu[segment]) + place * size, int(cu[segment + 1])
        covered += range(begin, min(begin + size, end))
        assert lengths[segment]  # kernels read the last row of a line's segment
    assert sorted(covered) == list(range(rows))
