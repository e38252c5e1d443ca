"""A parent's most likely tokens for every row of a corpus, on the disk, with the rows themselves.

`logits.json` is written first and says what the shards hold; `logits-N.safetensors` are its shards,
each whole or absent: input_ids, document_ids (rows, T) int32, lengths (rows,), ids (rows, T, k)
int32, log_probs (rows, T, k) float16 and rest (rows, T) float32.
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


@dataclass(frozen=True)
class LogitCache:
    """A complete cache, read row by row. about: its index. shards: opened files, in order."""

    folder: Path
    about: dict[str, Any]
    shards: list[Any]

    def corpus(self) -> Corpus:
        """The rows that were cached, mixed as they were given."""
        sizes: dict[str, int] = self.about["sources"]
        firsts = [0, *accumulate(sizes.values())]
        sources = {
            name: CachedRows(self, first, size)
            for (name, size), first in zip(sizes.items(), firsts, strict=False)
        }
        return Corpus(dict(sources), self.about["weights"])

    def predictions(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids (n, T, k) int64, log_probs (n, T, k) and rest (n, T), of the rows `index`, (n,)."""
        ids, log_probs, rest = self.read(_PREDICTION_FIELDS, index)
        return ids.long(), log_probs, rest

    def read(self, fields: tuple[str, ...], index: Tensor) -> tuple[Tensor, ...]:
        """Some rows of some tensors, (n, ...) each."""
        places = [divmod(row, self.about["rows_per_shard"]) for row in index.tolist()]
        return tuple(
            torch.cat([self.shards[s].get_slice(field)[row : row + 1] for s, row in places])
            for field in fields
        )

    def fingerprint(self) -> str:
        """Of the parent whose predictions these are, and how much of them was kept."""
        return f"{self.about['parent']} top {self.about['top_k']}"


@dataclass(frozen=True)
class CachedRows:
    """The rows of one source in a cache: `size` from `first` on."""

    cache: LogitCache
    first: int
    size: int

    def __len__(self) -> int:
        return self.size

    @property
    def tokens(self) -> int:
        """Tokens in all rows; none is padded."""
        return self.size * int(self.cache.about["context_length"])

    def rows(self, index: slice | Tensor) -> TokenRows:
        """Some of the rows, by slice or by (n,) indices."""
        wanted = torch.arange(self.first, self.first + self.size)[index]
        return TokenRows(*self.cache.read(_ROW_FIELDS, wanted))

    def fingerprint(self) -> str:
        """That of all rows in the cache, and which of them these are."""
        return f"{self.cache.about['data']} {self.first} {self.size}"


def open_logits(
    folder: Path, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int, length: int
) -> LogitCache:
    """Raises MolError unless it is a complete cache for this tokenizer and context length."""
    try:
        about = json.loads((folder / INDEX).read_text())
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}")
        missing = [number for number in range(_count(about)) if not _shard(folder, number).exists()]
        if missing:
            raise MolError(
                f"{folder} lacks {len(missing)} of {_count(about)} shards",
                allowed="a complete cache",
                hint="molcli data cache-logits with the same arguments and --resume",
            )
        shards = [safe_open(_shard(folder, n), framework="pt") for n in range(_count(about))]
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise MolError(
            f"{folder} is not a cache of logits, or damaged: {error}",
            allowed="a folder that `molcli data cache-logits` wrote",
        ) from error
    found = {
        "context_length": (about["context_length"], length),
        "vocabulary": (about["vocab_size"], vocab_size),
    }
    for name, (cached, wanted) in found.items():
        if cached != wanted:
            raise MolError(
                f"{folder} has a {name} of {cached}, this run one of {wanted}",
                hint=f"--set train.context_length={cached}" if name == "context_length" else "",
            )
    known = about["tokenizer"]
    if known and tokenizer is not None and tokenizer_fingerprint(tokenizer) != known:
        raise MolError(
            f"{folder} was made with another tokenizer than this model's",
            allowed="a cache of the parent that the model was converted from",
        )
    return LogitCache(folder, about, shards)


def write_logits(
    out: Path,
    about: dict[str, Any],
    predict: Callable[[int, int], dict[str, Tensor]],
    *,
    resume: bool,
) -> None:
    """Writes the cache's missing shards.

    about: what `resume` compares, `rows` and `rows_per_shard` among it. predict: the tensors of a
    shard, for its rows from the first to before the last. resume: `out` holds some of the cache;
    else it is empty. Raises MolError if there is nothing to resume, or another cache.
    """
    if not resume:
        out.mkdir(parents=True, exist_ok=True)
        _replace(out / INDEX, lambda path: path.write_text(json.dumps(about, indent=2) + "\n"))
    _refuse_other_cache(out, about)
    for number in range(_count(about)):
        if _shard(out, number).exists():
            continue
        first = number * about["rows_per_shard"]
        tensors = predict(first, min(first + about["rows_per_shard"], about["rows"]))
        _replace(_shard(out, number), partial(save_file, tensors))


def _refuse_other_cache(out: Path, about: dict[str, Any]) -> None:
    try:
        found = json.loads((out / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise MolError(
            f"there is no cache to resume in {out}", hint="the command without --resume"
        ) from error
    if changed := [name for name in about if found.get(name) != about[name]]:
        raise MolError(
            f"{out} belongs to another cache: other {', '.join(changed)}",
            allowed="the parent, data and recipe that it began with",
            hint="another output folder",
        )


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all."""
    staging = path.with_name(f".{path.name}.partial")
    write(staging)
    staging.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes its files private
    staging.replace(path)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"logits-{number:05d}.safetensors"


def _count(about: dict[str, Any]) -> int:
    return -(-int(about["rows"]) // int(about["rows_per_shard"]))
