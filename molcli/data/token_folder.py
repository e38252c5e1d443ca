"""Tokens on the disk: a folder of memory-mapped shards, written once and read at random.

`tokens-N.npy` holds documents end to end, uint16 where all of them fit, else int32, and
`documents-N.npy` their sizes, int64. No document crosses shards. `tokens.json` has their sha256
sums, and the fingerprint of the tokenizer that made them.
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

from molcli.data.packing import TokenRows
from molcli.data.tokenizer import tokenizer_fingerprint
from molcli.errors import MolError
from molcli.files.folders import output_folder

INDEX = "tokens.json"
FORMAT = 1
SHARD_TOKENS = 2**27


@dataclass(frozen=True)
class FolderRows:
    """The rows that `pack` would make of the same documents, put together as they are asked for.

    about: the folder's index. streams: each shard's tokens. firsts: where each shard begins in all
    of them. starts, ends: (documents,) int64, of each document in the order of packing: its place
    in the folder, and where it ends in the packed sequence.
    """

    about: dict[str, Any]
    streams: list[np.ndarray]
    firsts: list[int]
    starts: np.ndarray
    ends: np.ndarray
    length: int
    count: int
    packing: tuple[int | None, int | None, bool]

    def __len__(self) -> int:
        return self.count

    @property
    def tokens(self) -> int:
        """Tokens in all rows, padding left out."""
        return min(int(self.ends[-1]), self.count * self.length)

    def rows(self, index: slice | Tensor) -> TokenRows:
        """Some of the rows, read into memory, by slice or by (n,) indices."""
        wanted = torch.arange(len(self))[index].tolist()
        ids = np.zeros((len(wanted), self.length), dtype=np.int32)
        documents = np.zeros_like(ids)
        lengths = torch.zeros(len(wanted), dtype=torch.int64)
        for place, row in enumerate(wanted):
            at = 0
            for document, piece in self._pieces(row):
                ids[place, at : at + len(piece)] = piece
                documents[place, at:] = document  # padding carries the last document's id
                at += len(piece)
            lengths[place] = at
        return TokenRows(torch.from_numpy(ids), torch.from_numpy(documents), lengths)

    def fingerprint(self) -> str:
        """sha256 over the shards' sums and everything that decides which rows come of them."""
        sums = [shard["sha256"] for shard in self.about["shards"]]
        content = json.dumps([sums, self.length, *self.packing])
        return hashlib.sha256(content.encode()).hexdigest()

    def _pieces(self, row: int) -> Iterator[tuple[int, np.ndarray]]:
        """(document's number within the row, its tokens there)."""
        at, end = row * self.length, min((row + 1) * self.length, int(self.ends[-1]))
        first = document = int(np.searchsorted(self.ends, at, side="right"))
        while at < end:
            stop = min(end, int(self.ends[document]))
            if stop > at:
                begin = int(self.ends[document - 1]) if document else 0
                start = int(self.starts[document]) + at - begin
                shard = int(np.searchsorted(self.firsts, start, side="right")) - 1
                start -= self.firsts[shard]
                yield document - first, self.streams[shard][start : start + stop - at]
                at = stop
            document += 1


def load_folder_rows(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    length: int,
    limit: int | None = None,
    seed: int | None = None,
    keep_short: bool = False,
) -> FolderRows:
    """The rows of a folder that `write_token_folder` wrote; the arguments are `load_rows`'s.

    In memory are three numbers a document. Raises MolError if it is no such folder, was made with
    another tokenizer, has ids outside vocab_size, or does not fill a row.
    """
    about, streams, sizes = _open(folder)
    _refuse_other_tokenizer(folder, about, tokenizer, vocab_size)
    starts = sizes.cumsum() - sizes
    if limit is not None:
        kept = int(np.searchsorted(starts, limit))  # as `tokenize` stops: the last one is cut
        starts, sizes = starts[:kept], np.minimum(sizes[:kept], limit - starts[:kept])
    if seed is not None:
        shuffle = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).numpy()
        starts, sizes = starts[shuffle], sizes[shuffle]
    total = int(sizes.sum())
    count = -(-total // length) if keep_short else total // length
    if count == 0:
        raise MolError(
            f"{folder} has {total} tokens, which is less than one row of {length}",
            hint="more data, or a shorter context_length",
        )
    firsts = [0, *accumulate(map(len, streams))][:-1]
    packing = (limit, seed, keep_short)
    return FolderRows(about, streams, firsts, starts, sizes.cumsum(), length, count, packing)


def folder_documents(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    limit: int | None = None,
) -> Iterator[Tensor]:
    """The documents of such a folder, (tokens,) int32 each, in order; limit: only so many tokens,
    the last document cut. Raises MolError as `load_folder_rows` does.
    """
    about, streams, sizes = _open(folder)
    _refuse_other_tokenizer(folder, about, tokenizer, vocab_size)
    left = about["tokens"] if limit is None else limit
    wanted = iter(sizes.tolist())
    for stream in streams:  # no document goes on in the next shard
        at = 0
        while at < len(stream) and left > 0:
            size = next(wanted)
            yield torch.from_numpy(stream[at : at + min(size, left)].astype(np.int32))
            at, left = at + size, left - size


def write_token_folder(
    documents: Iterable[Tensor],
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    shard_tokens: int = SHARD_TOKENS,
) -> int:
    """Writes documents, (tokens,) each, as they come, holding one shard in memory; whole or not
    at all. Returns the number of tokens.

    shard_tokens: a shard is written when it has at least so many.
    """
    with output_folder(out) as staging:
        shards: list[dict[str, Any]] = []
        pending: list[np.ndarray] = []
        highest = -1

        def flush() -> None:
            sizes = np.array([len(document) for document in pending], dtype=np.int64)
            tokens = np.concatenate(pending)
            tokens = tokens.astype(np.uint16 if tokens.max() < 2**16 else np.int32)
            number, digest = len(shards), hashlib.sha256()
            for name, array in (("tokens", tokens), ("documents", sizes)):
                np.save(staging / _file(name, number), array)
                digest.update(array.tobytes())
            shards.append(
                {"tokens": len(tokens), "documents": len(sizes), "sha256": digest.hexdigest()}
            )
            pending.clear()

        waiting = 0
        for document in documents:
            if len(document):
                highest = max(highest, int(document.max()))
                pending.append(document.numpy())
                waiting += len(document)
            if waiting >= shard_tokens:
                flush()
                waiting = 0
        if pending:
            flush()
        tokens = sum(shard["tokens"] for shard in shards)
        about = {
            "format": FORMAT,
            "source": source,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
            "highest_id": highest,
            "tokens": tokens,
            "documents": sum(shard["documents"] for shard in shards),
            "shards": shards,
        }
        (staging / INDEX).write_text(json.dumps(about, indent=2) + "\n")
    return tokens


def _file(name: str, number: int) -> str:
    return f"{name}-{number:05d}.npy"


def _open(folder: Path) -> tuple[dict[str, Any], list[np.ndarray], np.ndarray]:
    """(index, each shard's tokens memory-mapped, (documents,) sizes)."""
    try:
        about = json.loads((folder / INDEX).read_text())
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}")
        streams, sizes = [], []
        for number, shard in enumerate(about["shards"]):
            tokens = np.load(folder / _file("tokens", number), mmap_mode="r")
            documents = np.load(folder / _file("documents", number))
            if (len(tokens), int(documents.sum())) != (shard["tokens"], shard["tokens"]):
                raise ValueError(f"shard {number} does not match {INDEX}")
            streams.append(tokens)
            sizes.append(documents)
        return about, streams, np.concatenate(sizes)
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise MolError(
            f"data `{folder}` is not tokenised data, or damaged: {error}",
            allowed="a file, or a folder that `molcli data tokenize` wrote",
            hint=f"molcli data tokenize TEXT {folder} --tokenizer CKPT",
        ) from error


def _refuse_other_tokenizer(
    folder: Path,
    about: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
) -> None:
    hint = f"molcli data tokenize {about['source']} NEW_FOLDER --tokenizer CKPT"
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != about["tokenizer"]:
        raise MolError(
            f"data `{folder}` was tokenised with another tokenizer than this model's",
            allowed="a folder made with this model's tokenizer, or text",
            hint=hint,
        )
    if about["highest_id"] >= vocab_size:
        raise MolError(
            f"data `{folder}` has token id {about['highest_id']}, "
            f"but the model's vocabulary has {vocab_size} entries",
            hint=hint,
        )
