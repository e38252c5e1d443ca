"""Logits on disk: from packed rows and a parent's predictions to a folder, and back to a `Corpus`.

Only the parent's top k predictions of each token are kept. `logits.json` is written first and
describes the shards; each of them is complete or absent.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molcli.data.checked import read_index, write_index
from molcli.data.logit_shard import (
    LogitShard,
    is_partial,
    shard_name,
    shard_number,
    write_logit_shard,
)
from molcli.data.mixture import Corpus
from molcli.data.packing import TokenRows
from molcli.data.tokenizer import tokenizer_fingerprint
from molcli.errors import MolError
from molcli.files.folders import refuse_existing
from molcli.files.hidden_folders import locked
from molcli.files.json_files import shortened

INDEX = "logits.json"
FORMAT = 1
SHARD_BYTES = 256 * 2**20
_ROW_FIELDS = ("input_ids", "document_ids", "lengths")
_PREDICTION_FIELDS = ("ids", "log_probs", "rest")
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "parent": str,
    "tokenizer": (str, type(None)),
    "vocab_size": int,
    "top_k": int,
    "context_length": int,
    "data": str,
    "sources": dict,
    "weights": dict,
    "rows": int,
    "rows_per_shard": int,
}
_COUNTS = ("vocab_size", "top_k", "context_length", "rows", "rows_per_shard")


def check_cache_folder(out: Path, *, resume: bool) -> None:
    """Check that a cache can be begun in a folder, or with `resume` continued.

    Files that are half-written are not in the way.

    Raises:
        MolError: If not.
    """
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    whole = [name for name in names if not is_partial(name)]
    if resume:
        # Where the first file was half-written, there is a cache to resume, without any row.
        if INDEX not in whole and (whole or not names):
            raise _nothing_to_resume(out)
    elif INDEX in whole:
        raise MolError(
            f"{out} holds cached logits",
            allowed="a path that does not exist yet, or an empty folder",
            hint="the same command with --resume writes what is missing; or give another path",
        )
    elif whole or not out.is_dir():
        refuse_existing(out)


@contextmanager
def cache_folder(out: Path, *, resume: bool) -> Iterator[None]:
    """Hold the folder of a cache, so that no other process writes it.

    What a killed call left half-written is removed. After an exception, an index without a shard is
    removed, and with it a folder that this call made: nothing is lost, and the same call works.

    Args:
        out: Empty or new; with `resume`, the folder of an earlier, stopped call.
        resume: Keep what is in the folder.

    Raises:
        MolError: If `out` is not empty, there is nothing to resume, or another process writes it.
    """
    if not out.is_dir():  # else under the lock: another process may be writing it
        check_cache_folder(out, resume=resume)
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, out):
        check_cache_folder(out, resume=resume)
        _remove_partial(out)
        has_index = (out / INDEX).exists()
        try:
            yield
        except BaseException:
            _remove_partial(out)
            if not has_index and not any(
                shard_number(path.name) is not None for path in out.iterdir()
            ):
                (out / INDEX).unlink(missing_ok=True)
            if is_new and not any(out.iterdir()):
                out.rmdir()
            raise


def write_logits(
    out: Path, metadata: dict[str, Any], predict: Callable[[int, int], dict[str, Tensor]]
) -> None:
    """Write what a cache lacks: the index and shards.

    Args:
        out: Held by `cache_folder`.
        metadata: Content of logits.json, including `rows` and `rows_per_shard`. It must equal the
            earlier call's, if there was one.
        predict: Called as predict(first, last), returns a shard's tensors for rows first to
            last - 1.

    Raises:
        MolError: If the folder holds another cache or a damaged shard, or a prediction is not
            finite.
    """
    if (out / INDEX).exists():
        has_sums = _check_same_cache(out, metadata)
        _check_present(out, metadata, has_sums=has_sums)
    else:
        write_index(out / INDEX, metadata)
    for number in range(_num_shards(metadata)):
        if (out / shard_name(number)).exists():
            continue
        first = number * metadata["rows_per_shard"]
        tensors = predict(first, min(first + metadata["rows_per_shard"], metadata["rows"]))
        write_logit_shard(out, number, metadata, tensors)


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
    metadata, has_sums = _read_index(folder)
    count = _num_shards(metadata)
    missing = count - _num_present(folder, count)
    if missing:
        raise MolError(
            f"{folder} lacks {missing} of {count} shards",
            allowed="a complete cache",
            hint="molcli data cache-logits with the same arguments and --resume",
        )
    try:
        shards = [LogitShard(folder, n, metadata, has_sum=has_sums) for n in range(count)]
    except (OSError, ValueError, SafetensorError) as error:
        raise _refusal(folder, error) from error
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
    shards: In order.
    """

    folder: Path
    metadata: dict[str, Any]
    shards: list[LogitShard]

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
            torch.cat([self.shards[s].read(field, row) for s, row in positions]) for field in fields
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


def _check_same_cache(out: Path, metadata: dict[str, Any]) -> bool:
    """Return whether its shards have sums."""
    found, has_sums = _read_index(out)
    if changed := [name for name in metadata if found[name] != metadata[name]]:
        raise MolError(
            f"{out} belongs to another cache: other {', '.join(changed)}",
            allowed="the parent, data and recipe that the cache was started with",
            hint="another output folder",
        )
    return has_sums


def _check_present(out: Path, metadata: dict[str, Any], *, has_sums: bool) -> None:
    """Check the shards that a stopped call wrote, before the others are made."""
    for number in range(_num_shards(metadata)):
        name = shard_name(number)
        if not (out / name).exists():
            continue
        try:
            LogitShard(out, number, metadata, has_sum=has_sums).check()
        except (OSError, ValueError, SafetensorError) as error:
            raise MolError(
                f"{out / name} is damaged: {shortened(error, 300)}",
                allowed="shards as `molcli data cache-logits` wrote them",
                hint=f"remove {out / name}, then the same command: it writes it again",
            ) from error


def _remove_partial(out: Path) -> None:
    for path in out.iterdir():
        if is_partial(path.name) and (path.is_symlink() or path.is_file()):
            path.unlink()


def _read_index(folder: Path) -> tuple[dict[str, Any], bool]:
    """Return the index, its numbers checked, and whether its shards have sums."""
    try:
        metadata, has_sums = read_index(folder / INDEX, _FIELDS)
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']}")
        for name in _COUNTS:
            if metadata[name] < 1:
                raise ValueError(f"{INDEX} has {name}: {shortened(metadata[name])}")
        if metadata["top_k"] > metadata["vocab_size"]:
            raise ValueError(f"{INDEX} has a top_k above its vocab_size")
        _check_sources(metadata)
        return metadata, has_sums
    except (OSError, ValueError, MolError) as error:
        raise _refusal(folder, error) from error


def _check_sources(metadata: dict[str, Any]) -> None:
    sizes, weights = metadata["sources"], metadata["weights"]
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{INDEX} gives {shortened(name)} {shortened(size)} rows")
    for name, weight in weights.items():
        # Compared before it is converted: an int may be too large for a float.
        is_number = type(weight) in (int, float) and 0 < weight < 1e300
        if not is_number or not isfinite(weight):
            raise ValueError(f"{INDEX} gives {shortened(name)} a weight of {shortened(weight)}")
    if list(sizes) != list(weights) or sum(sizes.values()) != metadata["rows"]:
        raise ValueError(f"the sources in {INDEX} do not have its rows")


def _num_present(folder: Path, count: int) -> int:
    """Count the shards that exist; an index may claim any number of them."""
    numbers = (shard_number(path.name) for path in folder.iterdir())
    return sum(number is not None and number < count for number in numbers)


def _num_shards(metadata: dict[str, Any]) -> int:
    return -(-int(metadata["rows"]) // int(metadata["rows_per_shard"]))


def _nothing_to_resume(out: Path) -> MolError:
    return MolError(f"there is no cache to resume in {out}", hint="the command without --resume")


def _refusal(folder: Path, error: Exception) -> MolError:
    problem = error.found if isinstance(error, MolError) else shortened(error, 300)
    return MolError(
        f"{folder} is not a cache of logits, or damaged: {problem}",
        allowed="a folder that `molcli data cache-logits` wrote",
    )
