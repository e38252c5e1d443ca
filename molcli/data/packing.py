"""Step 3, packing: from token ids per document to rows of one length, and rows to model inputs.

Documents are laid end to end and cut into rows. Document ids mark the boundaries, so that a model
keeps the documents of a row apart.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from molcli.errors import MolError

IGNORED = -100  # the label that Hugging Face losses ignore


def pack(
    documents: list[Tensor], length: int, *, seed: int | None, pad_last: bool = False
) -> "TokenRows":
    """Concatenate documents and cut the sequence into rows.

    A document that does not fit into the rest of its row continues in the next row, where it counts
    as a new document.

    Args:
        documents: (tokens,) int32 each.
        length: Tokens in a row (T).
        seed: Shuffles the documents; None keeps their order.
        pad_last: Pad the last, incomplete row instead of dropping it.

    Raises:
        MolError: If the tokens do not fill one row.
    """
    if seed is not None:
        shuffle = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
        documents = [documents[i] for i in shuffle.tolist()]
    sizes = torch.tensor([len(document) for document in documents], dtype=torch.int64)
    total = int(sizes.sum())
    count = -(-total // length) if pad_last else total // length
    if count == 0:
        raise MolError(
            f"the data has {total} tokens, which is less than one row of {length}",
            hint="more data, or a shorter context_length",
        )
    padding = max(count * length - total, 0)
    sequence = torch.cat([*documents, torch.zeros(padding, dtype=torch.int32)])
    sizes[-1] += padding  # padding has the last document's id, and is masked
    ids = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), sizes)
    ids = ids[: count * length].view(count, length)
    lengths = torch.full((count,), length)
    lengths[-1] -= padding
    return TokenRows(sequence[: count * length].view(count, length), ids - ids[:, :1], lengths)


class RowSource(Protocol):
    """Packed rows of one length, in memory (`TokenRows`) or on disk."""

    def __len__(self) -> int: ...

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows, without padding."""

    def select(self, index: slice | Tensor) -> "TokenRows":
        """Return some of the rows, by slice or by (n,) int64 indices."""

    def fingerprint(self) -> str:
        """Return a hash that identifies the content of the rows."""


@dataclass(frozen=True)
class TokenRows:
    """Packed rows in memory, 8 bytes per token.

    input_ids: (rows, T) int32.
    document_ids: (rows, T) int32, ascending within a row, from 0.
    lengths: (rows,) int64, tokens that are not padding; padding is on the right.
    """

    input_ids: Tensor
    document_ids: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows, without padding."""
        return int(self.lengths.sum())

    @property
    def num_documents(self) -> int:
        """Number of documents, summed over rows: one that spans two rows counts twice."""
        # NumPy, as in all small tasks between two training steps: torch would wake its threads,
        # which costs more than the task, and up to 0.1 s in a container with fewer CPUs than
        # threads.
        ids = self.document_ids.numpy()
        return len(ids) + int(np.count_nonzero(ids[:, 1:] != ids[:, :-1]))

    @property
    def num_targets(self) -> int:
        """Number of tokens that can be predicted: all but the first of each document in a row."""
        return self.tokens - self.num_documents

    def select(self, index: slice | Tensor) -> "TokenRows":
        """Return some of the rows, by slice or by (n,) int64 indices."""
        fields = (self.input_ids, self.document_ids, self.lengths)
        if isinstance(index, slice):
            return TokenRows(*(field[index] for field in fields))
        return TokenRows(*(torch.from_numpy(field.numpy()[index.numpy()]) for field in fields))

    def batch(self, index: slice | Tensor, device: torch.device | None = None) -> "Batch":
        """Build a model's inputs from some of the rows, on `device` (default: the CPU).

        Runs without host synchronisation: a GPU may still be busy with earlier work.
        """
        part = self.select(index)
        ids, documents = (_to_device(x, device).long() for x in (part.input_ids, part.document_ids))
        steps = torch.arange(ids.shape[1], device=device)
        starts = torch.diff(documents, dim=1, prepend=documents.new_full((len(ids), 1), -1)) != 0
        positions = steps - torch.where(starts, steps, 0).cummax(dim=1).values
        has_target, mask = ~starts, None
        if part.tokens < ids.numel():
            mask = (steps < _to_device(part.lengths, device)[:, None]).long()
            has_target = has_target & mask.bool()
        labels = torch.where(has_target, ids, IGNORED)
        return Batch(ids, documents, positions, labels, part.num_documents, mask)

    def batches(self, batch_size: int, device: torch.device | None = None) -> Iterator["Batch"]:
        """Yield all rows in order, in batches; the last batch may be smaller."""
        for first in range(0, len(self), batch_size):
            yield self.batch(slice(first, first + batch_size), device)

    def fingerprint(self) -> str:
        """Return the sha256 of the tokens and the document boundaries."""
        digest = hashlib.sha256(str(tuple(self.input_ids.shape)).encode())
        for tensor in (self.input_ids, self.document_ids, self.lengths):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Batch:
    """Packed rows as inputs of a model; tensors are (B, T) int64.

    position_ids: Restart at 0 with every document and every row.
    labels: Aligned with input_ids (the loss shifts them); IGNORED for the first token of a document
        in a row, and for padding.
    num_documents: In all rows. Counted on the CPU, so that no device has to synchronise.
    attention_mask: 1 for tokens, 0 for padding; None if no row is padded.
    """

    input_ids: Tensor
    document_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    num_documents: int
    attention_mask: Tensor | None

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        mask = self.attention_mask
        return self.input_ids.numel() if mask is None else int(mask.sum())

    def inputs(self) -> dict[str, Tensor | int | None]:
        """Return the keyword arguments of a MoL model: all fields but the labels."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "document_ids": self.document_ids,
            "num_documents": self.num_documents,
        }


def _to_device(x: Tensor, device: torch.device | None) -> Tensor:
    if device is None or device.type != "cuda":
        return x.to(device)
    # A copy from pageable memory would wait for all work queued on the GPU.
    return x.pin_memory().to(device, non_blocking=True)
