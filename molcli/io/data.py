"""What `--data` names, as packed rows: one source, or several by weight."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molcli.io.order import MixedOrder, Shares
from molcli.io.packing import Batch, Rows, TokenRows, pack
from molcli.io.text import read_documents, tokenize
from molcli.io.token_folder import folder_documents, load_folder_rows
from molcli.progress import Progress, silent


@dataclass(frozen=True)
class Corpus:
    """The rows of every source, one source after the other, and the weights to mix them by.

    sources: name -> rows. weights: name -> share of the tokens, in any unit.
    """

    sources: dict[str, Rows]
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
    sources: dict[str, Rows] = {}
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
