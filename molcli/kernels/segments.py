"""Segments of rows: padding them to one length and back, and dividing them into chunks.

A segment is a run of neighbouring rows, those of one document in one block. `cu_seqlens` holds the
segments' bounds: segment i is rows `cu_seqlens[i]` to `cu_seqlens[i + 1]`, the end excluded.
"""

import torch
from torch import Tensor


def chunk_table(cu_seqlens: Tensor, num_rows: int, size: int) -> Tensor:
    """Divide segments into chunks that do not cross a segment's bounds.

    The number of lines depends on shapes alone, since the exact number of chunks would need a host
    synchronisation. Unused lines point past the end of the last segment that has rows.

    Args:
        cu_seqlens: (num_segments + 1,) int64, bounds of the segments.
        num_rows: number of rows of all segments.
        size: most rows in a chunk.

    Returns:
        (num_rows // size + num_segments, 2) int64: each chunk's segment, and the chunk's number
        within that segment.
    """
    ends = ((cu_seqlens.diff() + size - 1) // size).cumsum(0)
    line = torch.arange(num_rows // size + ends.shape[0], device=ends.device)
    segment = torch.searchsorted(ends, torch.minimum(line, ends[-1] - 1), right=True)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    return torch.stack([segment, line - begins[segment]], dim=1)


def pad_segments(x: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """Pad every segment to one length, with zeros at the end.

    Args:
        x: (M, ...), a value per row.
        cu_seqlens: (num_segments + 1,), bounds of the segments.
        length: rows of a padded segment, at least those of the longest one.

    Returns:
        (num_segments, length, ...), in the dtype of `x`.
    """
    segment, index = _segment_and_index(cu_seqlens, x.shape[0])
    padded = x.new_zeros(cu_seqlens.shape[0] - 1, length, *x.shape[1:])
    return padded.index_put((segment, index), x)


def unpad_segments(x: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Undo `pad_segments`.

    Args:
        x: (num_segments, length, ...), padded segments.
        cu_seqlens: (num_segments + 1,), bounds of the segments.
        num_rows: number of rows M of all segments.

    Returns:
        (M, ...), a value per row.
    """
    return x[_segment_and_index(cu_seqlens, num_rows)]


def longest_segment(cu_seqlens: Tensor) -> int:
    """Return the number of rows of the longest segment, at least 1. Synchronises with the host."""
    return max(1, int(cu_seqlens.diff().max()))


def _segment_and_index(cu_seqlens: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Each row's segment and its index within that segment, (M,) each."""
    row = torch.arange(num_rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    segment = torch.searchsorted(cu_seqlens, row, right=True) - 1
    return segment, row - cu_seqlens[segment]
