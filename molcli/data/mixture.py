"""Step 5, mixture: from what `--data` names, one source or several by weight, to a `Corpus`.

A corpus gives rows, batches, and the order in which a run trains on them.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molcli.data.documents import read_documents
from molcli.data.order import MixedOrder, MixtureSchedule
from molcli.data.packing import Batch, RowSource, TokenRows, pack
from molcli.data.repeats import ListTokens, RepeatedRows
from molcli.data.token_folder import load_folder_rows, read_token_folder
from molcli.data.tokenizer import tokenize
from molcli.progress import Progress, phase, silent


def load_rows(
    data: str | dict[str, float],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    length: int,
    limit: int | None = None,
    seed: int | None = None,
    pad_last: bool = False,
    progress: Progress = silent,
) -> "Corpus":
    """Open one or several sources as packed rows.

    Args:
        data: A source: what `read_documents` reads, or a folder of `molcli data tokenize`, which
            stays on disk. Or a mapping from sources to their weights in tokens, in any unit.
        tokenizer: May be None if all sources hold token ids.
        vocab_size: Ids must be below it.
        length: Tokens in a row (T).
        limit: Use at most this many tokens in all; of each source its first ones, by weight.
        seed: Shuffles the documents of each source; None keeps their order.
        pad_last: Pad each source's last, incomplete row instead of dropping it.
        progress: Its phase "reading" counts the tokens of all sources as they are read.

    Raises:
        MolError: As `read_documents`, `tokenize`, `pack` and `load_folder_rows` do.
    """
    check_data(data)  # every source, before the first is read
    weights = {data: 1.0} if isinstance(data, str) else data
    if limit is None or len(weights) == 1:
        limits: list[int | None] = [limit] * len(weights)
    else:
        counts = MixtureSchedule(list(weights.values())).counts(-(-limit // length))
        limits = [max(count, 1) * length for count in counts]
    sources: dict[str, RowSource] = {}
    shares: dict[str, float | None] = {}
    texts = [limit for source, limit in zip(weights, limits, strict=True) if not _is_folder(source)]
    reading = _Reading(phase(progress, "reading"), texts)
    for source, source_limit in zip(weights, limits, strict=True):
        if _is_folder(source):
            rows = load_folder_rows(
                Path(source),
                tokenizer,
                vocab_size=vocab_size,
                length=length,
                limit=source_limit,
                seed=seed,
                pad_last=pad_last,
            )
            sources[source] = rows
            shares[source] = rows.share
        else:
            # One token more shows whether anything lies beyond the limit.
            ids = tokenize(
                read_documents(source, vocab_size=vocab_size),
                tokenizer,
                vocab_size=vocab_size,
                limit=None if source_limit is None else source_limit + 1,
                progress=_at_most(source_limit, reading.source()),
            )
            documents = list(ids)
            shares[source] = 1.0
            if source_limit is not None and sum(map(len, documents)) > source_limit:
                shares[source] = None  # the rest is not read: its size is unknown
                documents[-1] = documents[-1][:-1]
                if not len(documents[-1]):
                    documents.pop()
            sources[source] = pack(documents, length, seed=seed, pad_last=pad_last)
    return Corpus(sources, weights, shares)


def _at_most(limit: int | None, progress: Progress) -> Progress:
    """Return a callback that reports no more than `limit` tokens."""
    if limit is None:
        return progress

    def report(done: int, total: int | None, note: str = "") -> None:
        progress(min(done, limit), None if total is None else min(total, limit), note)

    return report


class _Reading:
    """Adds up the tokens of several sources that are read one after another.

    Args:
        progress: Called with the tokens of all sources so far, and of all there will be.
        limits: Of each source; None where the number of tokens is unknown before they are read.
    """

    def __init__(self, progress: Progress, limits: Sequence[int | None]) -> None:
        self._progress, self._left = progress, list(limits)
        self._before = 0  # tokens of the sources that have been read

    def source(self) -> Progress:
        """Return the callback for the next source."""
        before, (_, *later) = self._before, self._left
        self._left = later

        def report(done: int, total: int | None, note: str = "") -> None:
            self._before = before + done
            known = (
                None
                if total is None or None in later
                else total + sum(n for n in later if n is not None)
            )
            self._progress(self._before, None if known is None else before + known, note)

        return report


def _is_folder(source: str) -> bool:
    return Path(source).is_dir()


def load_documents(
    source: str, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int, limit: int | None
) -> Iterator[Tensor]:
    """Read the documents of one source as token ids, (tokens,) int32 each, lazily and in order.

    Args:
        source: As for `load_rows`.
        tokenizer: May be None if the source holds token ids.
        vocab_size: Ids must be below it.
        limit: Stop after this many tokens; the last document is cut.

    Raises:
        MolError: As `read_documents`, `tokenize` and `read_token_folder` do.
    """
    if Path(source).is_dir():
        return read_token_folder(Path(source), tokenizer, vocab_size=vocab_size, limit=limit)
    documents = read_documents(source, vocab_size=vocab_size)
    return tokenize(documents, tokenizer, vocab_size=vocab_size, limit=limit)


def check_data(data: str | dict[str, float]) -> None:
    """Check that every source exists and has a supported type; reads no content.

    Raises:
        MolError: If one does not.
    """
    for source in [data] if isinstance(data, str) else data:
        if not Path(source).is_dir():
            read_documents(source)


@dataclass(frozen=True)
class Corpus:
    """The rows of all sources, concatenated, and the weights to mix them by.

    sources: Name -> rows.
    weights: Name -> weight in tokens, in any unit.
    shares: Name -> share of the source's tokens that the rows hold; None where that is unknown,
        because a limit ended the reading. Names that are missing have all of them.
    """

    sources: dict[str, RowSource]
    weights: dict[str, float]
    shares: dict[str, float | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.sources.values()))

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows, without padding."""
        return sum(rows.tokens for rows in self.sources.values())

    def order(self, seed: int) -> MixedOrder:
        """Return the endless order of rows in which the sources have their weights."""
        return MixedOrder(self._sizes(), self._schedule(), seed)

    def epochs(self, num_entries: int) -> dict[str, float | None]:
        """Return the epochs over each source within the first `num_entries` entries of `order`.

        None where the rows are an unknown share of their source.
        """
        counts = self._schedule().counts(num_entries)
        found: dict[str, float | None] = {}
        for (name, rows), count in zip(self.sources.items(), counts, strict=True):
            share = self.shares.get(name, 1.0)
            found[name] = None if share is None else round(share * count / len(rows), 3)
        return found

    def with_repeats(self, share: float, *, count: int, seed: int, tokens: ListTokens) -> "Corpus":
        """Add a source "repeats", of rows that repeat themselves; see `repeats`.

        It comes first: what is left of `order` are the same rows in the same order as without it.

        Args:
            share: Its part of the rows, 0 or more, less than 1. 0 adds nothing.
            count: Its number of rows, which are made when they are read.
            seed: Of its rows.
            tokens: To write lists of pairs with.
        """
        if share == 0:
            return self
        name = "repeats"
        while name in self.sources:  # a file or folder may have this name
            name = f"({name})"
        length = self.select(slice(0, 1)).input_ids.shape[1]
        own = (self, self._sizes(), self._schedule(), count, length, seed, tokens)
        weight = share / (1 - share) * sum(self.weights.values())
        return Corpus(
            {name: RepeatedRows(*own), **self.sources},
            {name: weight, **self.weights},
            {name: None, **self.shares},  # nothing is passed over: the rows are new ones
        )

    def without_repeats(self) -> TokenRows:
        """Load rows mixed by weight until the first source is exhausted; no row repeats."""
        schedule, sizes = self._schedule(), self._sizes()
        offsets = [0, *accumulate(sizes)]
        entries = map(schedule.locate, range(schedule.max_without_repeats(sizes)))
        return self.select(torch.tensor([offsets[source] + row for source, row in entries]))

    def select(self, index: slice | Tensor) -> TokenRows:
        """Return some of the rows, by slice or by (n,) int64 indices."""
        if isinstance(index, slice):
            index = torch.arange(len(self))[index]
        ends = torch.tensor(list(accumulate(self._sizes())))
        owner = torch.bucketize(index, ends, right=True)
        parts, positions = [], []
        for source, rows in enumerate(self.sources.values()):
            own = (owner == source).nonzero()[:, 0]
            if len(own):
                parts.append(rows.select(index[own] - (ends[source] - len(rows))))
                positions.append(own)
        inverse = torch.cat(positions).argsort()
        fields = [(part.input_ids, part.document_ids, part.lengths) for part in parts]
        return TokenRows(*map(torch.cat, zip(*fields, strict=True))).select(inverse)

    def batch(self, index: Tensor, device: torch.device | None = None) -> Batch:
        """Build a model's inputs from the rows `index`, (B,) int64, on `device` (default: CPU)."""
        return self.select(index).batch(slice(None), device)

    def batches(self, batch_size: int, device: torch.device | None = None) -> Iterator[Batch]:
        """Yield all rows in order, source by source; the last batch may be smaller."""
        for index in torch.arange(len(self)).split(batch_size):
            yield self.batch(index, device)

    def fingerprint(self) -> str:
        """Return the sha256 of every source's fingerprint and weight; names do not count."""
        prints = [rows.fingerprint() for rows in self.sources.values()]
        if len(prints) == 1:
            return prints[0]
        content = json.dumps(list(zip(prints, self.weights.values(), strict=True)))
        return hashlib.sha256(content.encode()).hexdigest()

    def _sizes(self) -> list[int]:
        return [len(rows) for rows in self.sources.values()]

    def _schedule(self) -> MixtureSchedule:
        return MixtureSchedule(list(self.weights.values()))
