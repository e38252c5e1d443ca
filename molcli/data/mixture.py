"""Open what `--data` names, one source or several by weight, as an endless order of packed rows."""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molcli.data.documents import read_documents, tokenize
from molcli.data.packing import Batch, RowOrder, RowSource, TokenRows, pack
from molcli.data.token_folder import folder_documents, load_folder_rows
from molcli.progress import Progress, silent


class Shares:
    """Which source each entry of an endless sequence takes: no randomness, no drift.

    Among any first n entries every source has its share of n, rounded, up to one entry for each
    source before it: a batch holds nearly the same mixture as the whole run.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """weights: above 0, in any unit."""
        # As they are written, 0.7 for 7/10: exact, and so the same on every machine.
        exact = [Fraction(repr(float(weight))) for weight in weights]
        left = [sum(exact[k:], Fraction()) for k in range(len(exact))]
        # Source k takes this share of the entries that the sources before it leave.
        self._splits = [(weight / rest) for weight, rest in zip(exact, left, strict=True)]

    def place(self, entry: int) -> tuple[int, int]:
        """(source, how many entries of that source come before)."""
        for source, share in enumerate(self._splits):
            before, after = _taken(share, entry), _taken(share, entry + 1)
            if after > before:
                return source, before
            entry -= before
        raise AssertionError("the last source takes all that is left")

    def counts(self, entries: int) -> list[int]:
        """Entries of each source among the first so many."""
        found = []
        for share in self._splits:
            found.append(_taken(share, entries))
            entries -= found[-1]
        return found

    def before_a_repeat(self, sizes: Sequence[int]) -> int:
        """The most entries that take no source past its size."""

        def too_many(entries: int) -> bool:
            return any(n > size for n, size in zip(self.counts(entries), sizes, strict=True))

        return bisect_left(range(sum(sizes) + 1), True, key=too_many) - 1


class MixedOrder:
    """Entries as rows of the concatenated sources; every pass over a source is a permutation.

    sizes: rows of each source. shares: which source each entry takes.
    """

    def __init__(self, sizes: Sequence[int], shares: Shares, seed: int) -> None:
        self._orders = [RowOrder(size, seed) for size in sizes]
        self._firsts = [0, *accumulate(sizes)]
        self._shares = shares

    def take(self, first: int, count: int) -> Tensor:
        """(count,) int64, entries first to first + count - 1."""
        return torch.stack([self._entry(i) for i in range(first, first + count)])

    def _entry(self, entry: int) -> Tensor:
        source, place = self._shares.place(entry)
        return self._orders[source].take(place, 1)[0] + self._firsts[source]


def _taken(share: Fraction, entries: int) -> int:
    """round(entries * share), halves up, so that it never falls and grows by at most one."""
    p, q = share.numerator, share.denominator
    return (2 * entries * p + q) // (2 * q)


@dataclass(frozen=True)
class Corpus:
    """The rows of every source, one source after the other, and the weights to mix them by.

    sources: name -> rows. weights: name -> share of the tokens, in any unit.
    """

    sources: dict[str, RowSource]
    weights: dict[str, float]

    def __len__(self) -> int:
        return sum(map(len, self.sources.values()))

    @property
    def tokens(self) -> int:
        """Tokens in all rows, padding left out."""
        return sum(rows.tokens for rows in self.sources.values())

    def order(self, seed: int) -> MixedOrder:
        """The endless sequence of rows in which the sources have their weights."""
        return MixedOrder(self._sizes(), self._shares(), seed)

    def passes(self, entries: int) -> dict[str, float]:
        """How often the first so many entries of `order` go through each source."""
        counts = self._shares().counts(entries)
        return {
            name: round(count / len(rows), 3)
            for (name, rows), count in zip(self.sources.items(), counts, strict=True)
        }

    def once(self) -> TokenRows:
        """In memory, mixed by weight, until the first source runs out; none comes twice."""
        shares = self._shares()
        firsts = [0, *accumulate(self._sizes())]
        places = map(shares.place, range(shares.before_a_repeat(self._sizes())))
        return self.rows(torch.tensor([firsts[source] + row for source, row in places]))

    def rows(self, index: slice | Tensor) -> TokenRows:
        """Some of the rows, by slice or by (n,) indices."""
        if isinstance(index, slice):
            index = torch.arange(len(self))[index]
        ends = torch.tensor(list(accumulate(self._sizes())))
        owner = torch.bucketize(index, ends, right=True)
        parts, places = [], []
        for source, rows in enumerate(self.sources.values()):
            mine = (owner == source).nonzero()[:, 0]
            if len(mine):
                parts.append(rows.rows(index[mine] - (ends[source] - len(rows))))
                places.append(mine)
        back = torch.cat(places).argsort()
        fields = [(part.input_ids, part.document_ids, part.lengths) for part in parts]
        return TokenRows(*map(torch.cat, zip(*fields, strict=True))).rows(back)

    def batch(self, index: Tensor, device: torch.device | None = None) -> Batch:
        """Some of the rows as a model on the device (else the CPU) takes them."""
        return self.rows(index).batch(slice(None), device)

    def batches(self, batch_size: int, device: torch.device | None = None) -> Iterator[Batch]:
        """All rows in order, source by source."""
        for index in torch.arange(len(self)).split(batch_size):
            yield self.batch(index, device)

    def fingerprint(self) -> str:
        """sha256 over every source's fingerprint and weight; not over their names."""
        prints = [rows.fingerprint() for rows in self.sources.values()]
        if len(prints) == 1:
            return prints[0]
        content = json.dumps(list(zip(prints, self.weights.values(), strict=True)))
        return hashlib.sha256(content.encode()).hexdigest()

    def _sizes(self) -> list[int]:
        return [len(rows) for rows in self.sources.values()]

    def _shares(self) -> Shares:
        return Shares(list(self.weights.values()))


def check_data(data: str | dict[str, float]) -> None:
    """Raises MolError if a source is missing or of another kind; looks at names alone."""
    for source in [data] if isinstance(data, str) else data:
        if not Path(source).is_dir():
            read_documents(source)


def load_documents(
    source: str, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int, limit: int | None
) -> Iterator[Tensor]:
    """The documents of one source, (tokens,) int32 each, as they are asked for, in its order.

    limit: only so many tokens. Raises MolError as `load_rows` does.
    """
    if Path(source).is_dir():
        return folder_documents(Path(source), tokenizer, vocab_size=vocab_size, limit=limit)
    return tokenize(read_documents(source), tokenizer, vocab_size=vocab_size, limit=limit)


def load_rows(
    data: str | dict[str, float],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    length: int,
    limit: int | None = None,
    seed: int | None = None,
    keep_short: bool = False,
    progress: Progress = silent,
) -> Corpus:
    """The packed rows of a source (see `read_documents`), of a folder of `molcli data tokenize`,
    which is not read into memory, or of a mapping from such to their weights.

    length, seed, keep_short: as for `pack`. limit: only so many tokens, of each source its first.
    Raises MolError as `read_documents`, `tokenize`, `pack` and `load_folder_rows` do.
    """
    check_data(data)  # the last of several, too, before the first is read
    weights = {data: 1.0} if isinstance(data, str) else data
    if limit is None or len(weights) == 1:
        limits: list[int | None] = [limit] * len(weights)
    else:
        counts = Shares(list(weights.values())).counts(-(-limit // length))
        limits = [max(count, 1) * length for count in counts]
    sources: dict[str, RowSource] = {}
    for source, most in zip(weights, limits, strict=True):
        if Path(source).is_dir():
            sources[source] = load_folder_rows(
                Path(source),
                tokenizer,
                vocab_size=vocab_size,
                length=length,
                limit=most,
                seed=seed,
                keep_short=keep_short,
            )
        else:
            ids = tokenize(
                read_documents(source),
                tokenizer,
                vocab_size=vocab_size,
                limit=most,
                progress=progress,
            )
            sources[source] = pack(list(ids), length, seed=seed, keep_short=keep_short)
    return Corpus(sources, weights)
