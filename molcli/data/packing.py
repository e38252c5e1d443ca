"""Documents packed into rows of one length, in which no document sees another."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from molcli.errors import MolError

IGNORED = -100  # the label that Hugging Face losses leave out


@dataclass(frozen=True)
class Batch:
    """Packed rows as a model takes them, (B, T) int64 each.

    position_ids restart with every document and every row. labels are aligned with input_ids
    (shift them in the loss); IGNORED where nothing comes before the token or it is padding.
    num_documents: in all rows; known here, where counting them makes no device wait.
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
        """Tokens that are not padding."""
        mask = self.attention_mask
        return self.input_ids.numel() if mask is None else int(mask.sum())

    def inputs(self) -> dict[str, Tensor | int | None]:
        """The keyword arguments of a MoL model: all but the labels."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "document_ids": self.document_ids,
            "num_documents": self.num_documents,
        }


class RowSource(Protocol):
    """Packed rows of one length, in memory or on the disk."""

    def __len__(self) -> int: ...

    @property
    def tokens(self) -> int:
        """Tokens in all rows, padding left out."""

    def rows(self, index: slice | Tensor) -> "TokenRows":
        """Some of the rows, by slice or by (n,) indices."""

    def fingerprint(self) -> str:
        """sha256 that tells these rows from others."""


@dataclass(frozen=True)
class TokenRows:
    """Rows in memory: 8 bytes a token.

    input_ids, document_ids: (rows, T) int32; document ids count up within a row, from 0.
    lengths: (rows,) tokens that are not padding, which is at the right.
    """

    input_ids: Tensor
    document_ids: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Tokens in all rows, padding left out."""
        return int(self.lengths.sum())

    @property
    def num_documents(self) -> int:
        """Of all rows together: one that two rows share counts twice."""
        # By NumPy, as is every small task between two steps: torch would wake its threads, which
        # costs more, and in a container that may not use as many, a tenth of a second.
        ids = self.document_ids.numpy()
        return len(ids) + int(np.count_nonzero(ids[:, 1:] != ids[:, :-1]))

    @property
    def predicted(self) -> int:
        """Tokens that another one of their document and row precedes."""
        return self.tokens - self.num_documents

    def rows(self, index: slice | Tensor) -> "TokenRows":
        """Some of the rows, by slice or by (n,) indices."""
        fields = (self.input_ids, self.document_ids, self.lengths)
        if isinstance(index, slice):
            return TokenRows(*(field[index] for field in fields))
        return TokenRows(*(torch.from_numpy(field.numpy()[index.numpy()]) for field in fields))

    def batch(self, index: slice | Tensor, device: torch.device | None = None) -> Batch:
        """Some of the rows as a model on the device (else the CPU) takes them. A GPU may still be
        at other work, for which nothing here waits."""
        part = self.rows(index)
        ids, documents = (_moved(x, device).long() for x in (part.input_ids, part.document_ids))
        steps = torch.arange(ids.shape[1], device=device)
        starts = torch.diff(documents, dim=1, prepend=documents.new_full((len(ids), 1), -1)) != 0
        positions = steps - torch.where(starts, steps, 0).cummax(dim=1).values
        real, mask = ~starts, None
        if part.tokens < ids.numel():
            mask = (steps < _moved(part.lengths, device)[:, None]).long()
            real = real & mask.bool()
        labels = torch.where(real, ids, IGNORED)
        return Batch(ids, documents, positions, labels, part.num_documents, mask)

    def batches(self, batch_size: int, device: torch.device | None = None) -> Iterator[Batch]:
        """All rows in order."""
        for first in range(0, len(self), batch_size):
            yield self.batch(slice(first, first + batch_size), device)

    def fingerprint(self) -> str:
        """sha256 over the tokens and the document boundaries."""
        digest = hashlib.sha256(str(tuple(self.input_ids.shape)).encode())
        for tensor in (self.input_ids, self.document_ids, self.lengths):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def _moved(x: Tensor, device: torch.device | None) -> Tensor:
    if device is None or device.type != "cuda":
        return x.to(device)
    # A copy from pageable memory waits until the GPU has done all that it was given.
    return x.pin_memory().to(device, non_blocking=True)


class RowOrder:
    """An endless sequence of rows in which every epoch is a permutation of its own.

    Entry i depends on i and the seed alone: a run that resumes needs only its place.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows, self.seed = num_rows, seed
        self._epoch, self._rows = -1, torch.empty(0, dtype=torch.int64)

    def take(self, first: int, count: int) -> Tensor:
        """(count,) int64, entries first to first + count - 1."""
        return torch.stack([self._entry(i) for i in range(first, first + count)])

    def _entry(self, index: int) -> Tensor:
        epoch, place = divmod(index, self.num_rows)
        if epoch != self._epoch:
            # A generator mixes its seed well, so neighbouring seeds share nothing.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._rows = epoch, torch.randperm(self.num_rows, generator=generator)
        return self._rows[place]


def pack(
    documents: list[Tensor], length: int, *, seed: int | None, keep_short: bool = False
) -> TokenRows:
    """Lay the documents end to end and cut rows from them.

    documents: (tokens,) int32 each. length: tokens in a row (T). seed: shuffles the documents; None
    keeps their order. keep_short: pads the last row instead of dropping it.
    A document longer than what is left of its row goes on, as a new document, in the next one.
    Raises MolError if not one row comes out.
    """
    if seed is not None:
        shuffle = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
        documents = [documents[i] for i in shuffle.tolist()]
    sizes = torch.tensor([len(document) for document in documents], dtype=torch.int64)
    total = int(sizes.sum())
    count = -(-total // length) if keep_short else total // length
    if count == 0:
        raise MolError(
            f"the data has {total} tokens, which is less than one row of {length}",
            hint="more data, or a shorter context_length",
        )
    padding = max(count * length - total, 0)
    stream = torch.cat([*documents, torch.zeros(padding, dtype=torch.int32)])
    sizes[-1] += padding  # padding carries the last document's id, and is masked
    ids = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), sizes)
    ids = ids[: count * length].view(count, length)
    lengths = torch.full((count,), length)
    lengths[-1] -= padding
    return TokenRows(stream[: count * length].view(count, length), ids - ids[:, :1], lengths)
