"""Logits on disk: from packed rows and a parent's predictions to a folder, and back to a `Corpus`.

Only the parent's top k predictions of each token are kept. `logits.json` is written first and
describes the shards. Each shard `logits-N.safetensors` is complete or absent, and holds input_ids
and document_ids, (rows, T) int32; lengths, (rows,) int64; ids, (rows, T, k) int32; log_probs,
(rows, T, k) float16; and rest, (rows, T) float32.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molcli.data.mixture import Corpus
from molcli.data.packing import TokenRows
from molcli.data.tokenizer import tokenizer_fingerprint
from molcli.errors import MolError

INDEX = "logits.json"
FORMAT = 1
SHARD_BYTES = 256 * 2**20
_ROW_FIELDS = ("input_ids", "document_ids", "lengths")
_PREDICTION_FIELDS = ("ids", "log_probs", "rest")


def write_logits(
    out: Path,
    metadata: dict[str, Any],
    predict: Callable[[int, int], dict[str, Tensor]],
    *,
    resume: bool,
) -> None:
    """Write the missing shards of a cache.

    Args:
        out: Empty or new; with `resume`, the folder of an earlier, stopped call.
        metadata: Content of logits.json, including `rows` and `rows_per_shard`. With `resume` it
            must equal the earlier call's.
        predict: Called as predict(first, last), returns a shard's tensors for rows first to
            last - 1.
        resume: Keep the shards that exist.

    Raises:
        MolError: If there is nothing to resume, or the folder holds another cache.
    """
    if not resume:
        out.mkdir(parents=True, exist_ok=True)
        _write_file(
            out / INDEX, lambda path: path.write_text(json.dumps(metadata, indent=2) + "\n")
        )
    _check_same_cache(out, metadata)
    for number in range(_num_shards(metadata)):
        if _shard(out, number).exists():
            continue
        first = number * metadata["rows_per_shard"]
        tensors = predict(first, min(first + metadata["rows_per_shard"], metadata["rows"]))
        _write_file(_shard(out, number), partial(save_file, tensors))


def open_logits(
    folder: Path, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int, length: int
) -> "LogitCache":
    """Open a complete cache.

    Args:
        folder: Written by `write_logits`.
        tokenizer: If given, must be the parent's.
        vocab_size: Must be the parent's.
        length: Tokens in a row (T); must be the cache's.

    Raises:
        MolError: If it is not such a folder, is incomplete or damaged, or does not fit the
            arguments.
    """
    try:
        metadata = json.loads((folder / INDEX).read_text())
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']}")
        count = _num_shards(metadata)
        missing = [number for number in range(count) if not _shard(folder, number).exists()]
        if missing:
            raise MolError(
                f"{folder} lacks {len(missing)} of {count} shards",
                allowed="a complete cache",
                hint="molcli data cache-logits with the same arguments and --resume",
            )
        shards = [safe_open(_shard(folder, number), framework="pt") for number in range(count)]
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise MolError(
            f"{folder} is not a cache of logits, or damaged: {error}",
            allowed="a folder that `molcli data cache-logits` wrote",
        ) from error
    values = {
        "context_length": (metadata["context_length"], length),
        "vocabulary": (metadata["vocab_size"], vocab_size),
    }
    for name, (cached, required) in values.items():
        if cached != required:
            raise MolError(
                f"{folder} has a {name} of {cached}, but this run has one of {required}",
                hint=f"--set train.context_length={cached}" if name == "context_length" else "",
            )
    known = metadata["tokenizer"]
    if known and tokenizer is not None and tokenizer_fingerprint(tokenizer) != known:
        raise MolError(
            f"{folder} was made with another tokenizer than this model's",
            allowed="a cache of the parent that the model was converted from",
        )
    return LogitCache(folder, metadata, shards)


@dataclass(frozen=True)
class LogitCache:
    """A complete cache, read row by row.

    metadata: Content of logits.json.
    shards: Open safetensors files, in order.
    """

    folder: Path
    metadata: dict[str, Any]
    shards: list[Any]

    def corpus(self) -> Corpus:
        """Return the cached rows, with the sources and weights of the original corpus."""
        sizes: dict[str, int] = self.metadata["sources"]
        offsets = [0, *accumulate(sizes.values())]
        sources = {
            name: CachedRows(self, first, size)
            for (name, size), first in zip(sizes.items(), offsets, strict=False)
        }
        return Corpus(dict(sources), self.metadata["weights"])

    def predictions(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read the predictions for the rows `index`, (n,) int64.

        Returns:
            ids (n, T, k) int64, log_probs (n, T, k) float16, and rest (n, T) float32, the log of
            the probability outside the top k.
        """
        ids, log_probs, rest = self.read(_PREDICTION_FIELDS, index)
        return ids.long(), log_probs, rest

    def read(self, fields: tuple[str, ...], index: Tensor) -> tuple[Tensor, ...]:
        """Read the rows `index`, (n,) int64, of some tensors; each result is (n, ...)."""
        positions = [divmod(row, self.metadata["rows_per_shard"]) for row in index.tolist()]
        return tuple(
            torch.cat([self.shards[s].get_slice(field)[row : row + 1] for s, row in positions])
            for field in fields
        )

    def fingerprint(self) -> str:
        """Identify the parent whose predictions these are, and k."""
        return f"{self.metadata['parent']} top {self.metadata['top_k']}"


@dataclass(frozen=True)
class CachedRows:
    """The rows of one source in a cache (a `RowSource`): `size` rows from `first` on."""

    cache: LogitCache
    first: int
    size: int

    def __len__(self) -> int:
        return self.size

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows; no row is padded."""
        return self.size * int(self.cache.metadata["context_length"])

    def select(self, index: slice | Tensor) -> TokenRows:
        """Read some of the rows into memory, by slice or by (n,) int64 indices."""
        rows = torch.arange(self.first, self.first + self.size)[index]
        return TokenRows(*self.cache.read(_ROW_FIELDS, rows))

    def fingerprint(self) -> str:
        """Identify the rows by the hash of all cached rows and their range."""
        return f"{self.cache.metadata['data']} {self.first} {self.size}"


def _check_same_cache(out: Path, metadata: dict[str, Any]) -> None:
    try:
        found = json.loads((out / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise MolError(
            f"there is no cache to resume in {out}", hint="the command without --resume"
        ) from error
    if changed := [name for name in metadata if found.get(name) != metadata[name]]:
        raise MolError(
            f"{out} belongs to another cache: other {', '.join(changed)}",
            allowed="the parent, data and recipe that the cache was started with",
            hint="another output folder",
        )


def _write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all."""
    partial_path = path.with_name(f".{path.name}.partial")
    write(partial_path)
    partial_path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes its files private
    partial_path.replace(path)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"logits-{number:05d}.safetensors"


def _num_shards(metadata: dict[str, Any]) -> int:
    return -(-int(metadata["rows"]) // int(metadata["rows_per_shard"]))
