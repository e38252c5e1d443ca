"""Tokens on disk: from documents as token ids to a folder of memory-mapped shards, and to rows.

`tokens.json` has the shards' sha256 sums, the fingerprint of the tokenizer and a sum of itself. A
document never spans two shards.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molcli.data.checked import read_index, write_index
from molcli.data.packing import TokenRows
from molcli.data.token_shard import TokenShard, write_token_shard
from molcli.data.tokenizer import tokenizer_fingerprint
from molcli.errors import MolError
from molcli.files.folders import output_folder
from molcli.files.json_files import shortened

INDEX = "tokens.json"
FORMAT = 1
SHARD_TOKENS = 2**27
_FIELDS: dict[str, type] = {
    "format": int,
    "source": str,
    "tokenizer": str,
    "vocab_size": int,
    "highest_id": int,
    "tokens": int,
    "documents": int,
    "shards": list,
}


def write_token_folder(
    documents: Iterable[Tensor],
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    shard_tokens: int = SHARD_TOKENS,
) -> int:
    """Write documents to a new folder, holding one shard in memory; complete or not at all.

    Args:
        documents: (tokens,) each.
        out: Must not exist, or be empty.
        tokenizer: The one that made the ids.
        source: Name of the text; error messages show it.
        shard_tokens: A shard is written as soon as it has at least this many tokens.

    Returns:
        Number of tokens.

    Raises:
        MolError: As `output_folder` does.
    """
    with output_folder(out) as staging:
        shards: list[dict[str, Any]] = []
        pending: list[np.ndarray] = []
        pending_tokens = 0
        highest = -1
        for document in documents:
            if len(document):
                highest = max(highest, int(document.max()))
                pending.append(document.numpy())
                pending_tokens += len(document)
            if pending_tokens >= shard_tokens:
                shards.append(write_token_shard(staging, len(shards), pending))
                pending, pending_tokens = [], 0
        if pending:
            shards.append(write_token_shard(staging, len(shards), pending))
        tokens = sum(shard["tokens"] for shard in shards)
        metadata = {
            "format": FORMAT,
            "source": source,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
            "highest_id": highest,
            "tokens": tokens,
            "documents": sum(shard["documents"] for shard in shards),
            "shards": shards,
        }
        write_index(staging / INDEX, metadata)
    return tokens


def read_token_folder(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    limit: int | None = None,
) -> Iterator[Tensor]:
    """Read the documents of a folder, (tokens,) int32 each, lazily and in order.

    Args:
        folder: Written by `write_token_folder`.
        tokenizer: If given, must be the one that made the ids.
        vocab_size: Ids must be below it.
        limit: Stop after this many tokens; the last document is cut.

    Raises:
        MolError: If it is not such a folder, is damaged, or does not fit the arguments.
    """
    metadata, shards, sizes = _open(folder)
    _check_tokenizer(folder, metadata, tokenizer, vocab_size)
    remaining = metadata["tokens"] if limit is None else limit
    sizes_left = iter(sizes.tolist())
    for shard in shards:  # no document spans two shards
        at = 0
        while at < len(shard) and remaining > 0:
            size = next(sizes_left)
            part = shard.read(slice(at, at + min(size, remaining)))
            yield torch.from_numpy(part.astype(np.int32))
            at, remaining = at + size, remaining - size


def load_folder_rows(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    length: int,
    limit: int | None = None,
    seed: int | None = None,
    pad_last: bool = False,
) -> "FolderRows":
    """Open a folder as packed rows; three numbers per document are held in memory.

    The rows are those that `pack` makes of the same documents, for the same arguments.

    Args:
        folder: Written by `write_token_folder`.
        tokenizer: If given, must be the one that made the ids.
        vocab_size: Ids must be below it.
        length: Tokens in a row (T).
        limit: Use the first this many tokens; the last document is cut.
        seed: Shuffles the documents; None keeps their order.
        pad_last: Pad the last, incomplete row instead of dropping it.

    Raises:
        MolError: As `read_token_folder` does, and if the tokens do not fill one row.
    """
    metadata, shards, sizes = _open(folder)
    _check_tokenizer(folder, metadata, tokenizer, vocab_size)
    starts = sizes.cumsum() - sizes
    if limit is not None:
        kept = int(np.searchsorted(starts, limit))  # as in `tokenize`, the last document is cut
        starts, sizes = starts[:kept], np.minimum(sizes[:kept], limit - starts[:kept])
    if seed is not None:
        shuffle = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).numpy()
        starts, sizes = starts[shuffle], sizes[shuffle]
    total = int(sizes.sum())
    count = -(-total // length) if pad_last else total // length
    if count == 0:
        raise MolError(
            f"{folder} has {total} tokens, which is less than one row of {length}",
            hint="more data, or a shorter context_length",
        )
    offsets = [0, *accumulate(map(len, shards))][:-1]
    packing = (limit, seed, pad_last)
    return FolderRows(metadata, shards, offsets, starts, sizes.cumsum(), length, count, packing)


@dataclass(frozen=True)
class FolderRows:
    """Packed rows on disk (a `RowSource`), assembled on access.

    metadata: Content of tokens.json.
    shards: In order.
    offsets: Position of each shard's first token within the folder.
    starts: (documents,) int64, position of each document within the folder, in packing order.
    ends: (documents,) int64, position after each document within the packed sequence.
    length: Tokens in a row (T).
    count: Number of rows.
    packing: limit, seed and pad_last, for the fingerprint.
    """

    metadata: dict[str, Any]
    shards: list[TokenShard]
    offsets: list[int]
    starts: np.ndarray
    ends: np.ndarray
    length: int
    count: int
    packing: tuple[int | None, int | None, bool]

    def __len__(self) -> int:
        return self.count

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows, without padding."""
        return min(int(self.ends[-1]), self.count * self.length)

    def select(self, index: slice | Tensor) -> TokenRows:
        """Read some of the rows into memory, by slice or by (n,) int64 indices."""
        rows = torch.arange(len(self))[index].tolist()
        ids = np.zeros((len(rows), self.length), dtype=np.int32)
        documents = np.zeros_like(ids)
        lengths = torch.zeros(len(rows), dtype=torch.int64)
        for i, row in enumerate(rows):
            at = 0
            for document, piece in self._pieces(row):
                ids[i, at : at + len(piece)] = piece
                documents[i, at:] = document  # padding has the last document's id
                at += len(piece)
            lengths[i] = at
        return TokenRows(torch.from_numpy(ids), torch.from_numpy(documents), lengths)

    @property
    def share(self) -> float:
        """Share of the folder's tokens that a limit leaves."""
        return float(self.ends[-1] / self.metadata["tokens"])

    def fingerprint(self) -> str:
        """Return the sha256 of the shards' sums and of all arguments that decide the rows."""
        sums = [shard["sha256"] for shard in self.metadata["shards"]]
        content = json.dumps([sums, self.length, *self.packing])
        return hashlib.sha256(content.encode()).hexdigest()

    def _pieces(self, row: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (document's number within the row, its tokens in the row)."""
        at, end = row * self.length, min((row + 1) * self.length, int(self.ends[-1]))
        first = document = int(np.searchsorted(self.ends, at, side="right"))
        while at < end:
            stop = min(end, int(self.ends[document]))
            if stop > at:
                document_start = int(self.ends[document - 1]) if document else 0
                start = int(self.starts[document]) + at - document_start
                shard = int(np.searchsorted(self.offsets, start, side="right")) - 1
                start -= self.offsets[shard]
                yield document - first, self.shards[shard].read(slice(start, start + stop - at))
                at = stop
            document += 1


def _open(folder: Path) -> tuple[dict[str, Any], list[TokenShard], np.ndarray]:
    """Return (index, shards, (documents,) sizes)."""
    try:
        metadata, _ = read_index(folder / INDEX, _FIELDS)
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']}")
        highest, entries = metadata["highest_id"], metadata["shards"]
        if not entries:
            raise ValueError(f"{INDEX} names no shards")
        shards = [TokenShard(folder, *entry, highest) for entry in enumerate(entries)]
        sizes = np.concatenate([shard.sizes for shard in shards])
        if (sum(map(len, shards)), len(sizes)) != (metadata["tokens"], metadata["documents"]):
            raise ValueError(f"{INDEX} does not have the sums of its shards")
        return metadata, shards, sizes
    except (OSError, ValueError, MolError) as error:
        problem = error.found if isinstance(error, MolError) else shortened(error, 300)
        raise MolError(
            f"data `{folder}` is not tokenised data, or damaged: {problem}",
            allowed="a file, or a folder that `molcli data tokenize` wrote",
            hint=f"molcli data tokenize TEXT {folder} --tokenizer CKPT",
        ) from error


def _check_tokenizer(
    folder: Path,
    metadata: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
) -> None:
    hint = f"molcli data tokenize {shortened(metadata['source'], 200)} NEW_FOLDER --tokenizer CKPT"
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != metadata["tokenizer"]:
        raise MolError(
            f"data `{folder}` was tokenised with another tokenizer than this model's",
            allowed="a folder made with this model's tokenizer, or text",
            hint=hint,
        )
    if metadata["highest_id"] >= vocab_size:
        raise MolError(
            f"data `{folder}` has token id {metadata['highest_id']}, "
            f"but the model's vocabulary has {vocab_size} entries",
            hint=hint,
        )
