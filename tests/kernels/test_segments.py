"""Padding of segments, and their division into chunks."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from molcli.kernels.segments import chunk_table, pad_segments, unpad_segments


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
def test_chunks_cover_every_row_once_and_unused_lines_none(lengths, size):
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
