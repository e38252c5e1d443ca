"""Step 5b, repeats: rows that say something twice, made from the rows of a corpus as they are read.

A model learns to look something up in its context from text in which that pays off, and loses it
again on text where it rarely does. Rows are of two kinds, half each: passages that come back after
other text, and lists of pairs that come back in another order. A row is one document, so that
attention sees both copies. Nothing is stored: a row depends on the corpus, the seed and its number.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molcli.config.stages import SHORTEST_REPEATS
from molcli.data.order import MixtureSchedule
from molcli.data.packing import RowSource, TokenRows

_FORMAT = 2  # of the rows: another number where the same seed gives other rows
# Tokens, fewer where the row is short.
_PASSAGE = (16, 128)
_DISTANCE = (64, 1024)  # from the end of a passage to the start of its copy
_KEY = (1, 3)  # the same for all keys of a row: then no key begins another one
_LINK = (0, 2)  # between key and value; of a row, always the same
_VALUE = (1, 4)
_PAIRS = (4, 64)  # of a list
_LONGEST_PAIR = _KEY[1] + _LINK[1] + _VALUE[1] + 1  # with its separator


@dataclass(frozen=True)
class ListTokens:
    """What lists of pairs are written with.

    separator: Token after each pair; None takes one of the text's.
    avoided: Tokens that no key and no value holds. Without a colon, the lists are never those of
        the recall test (`molcli evaluate`), so that training does not teach the test.
    """

    separator: int | None = None
    avoided: tuple[int, ...] = ()


def list_tokens(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> ListTokens:
    """Return the newline as separator; avoided are special tokens, colons and newlines.

    Args:
        tokenizer: None gives neither.
        vocab_size: Of the model; a separator beyond it is none.
    """
    if tokenizer is None:
        return ListTokens()
    special = set(tokenizer.all_special_ids)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    signs = {
        i
        for token, i in vocabulary.items()
        if token in ("<0x3A>", "<0x0A>") or not {":", "\n", "Ċ"}.isdisjoint(token)
    }
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    known = bool(newline) and newline[0] not in special and newline[0] < vocab_size
    return ListTokens(newline[0] if known else None, tuple(sorted(special | signs)))


def passages_row(
    text: np.ndarray, documents: np.ndarray, between: np.ndarray, generator: torch.Generator
) -> np.ndarray:
    """Build a row of passages that come back: A B A, as often as it fits, then the rest of B.

    A passage has 16 to 128 tokens, from one document where that has 16. Between its two copies are
    64 to 1,024 tokens of other text, log-uniformly. In rows of fewer than 512 tokens, a passage has
    at most a quarter of the row, and less may lie between.

    Args:
        text: (T,) int32, of which passages are taken, in order.
        documents: (T,) int32, document ids of `text`, ascending.
        between: (T,) int32, the other text.
        generator: Decides sizes and distances.

    Returns:
        (T,) int32.
    """
    length = left = len(text)
    shortest, nearest = min(_PASSAGE[0], length // 4), min(_DISTANCE[0], length // 2)
    parts, at, used = [], 0, 0
    while (longest := min(_PASSAGE[1], length // 4, (left - nearest) // 2)) >= shortest:
        start, at = _passage(documents, at, _uniform(shortest, longest, generator), shortest)
        passage = text[start:at]
        farthest = min(_DISTANCE[1], left - 2 * len(passage))
        distance = _log_uniform(nearest, farthest, generator)
        parts += [passage, between[used : used + distance], passage]
        used += distance
        left -= 2 * len(passage) + distance
    return np.concatenate([*parts, between[used : used + left]])


def pairs_row(
    text: np.ndarray, between: np.ndarray, generator: torch.Generator, tokens: ListTokens
) -> np.ndarray | None:
    """Build a row of lists that come back: pairs, other text, the same pairs in another order.

    A pair is a key of 1 to 3 tokens, a link of up to 2, a value of 1 to 4, and the separator. Keys
    differ, and have one length. The link is taken from the text, a new one in each row, so that a
    model learns to look up whatever stands between. There are as many lists as fit, then the rest
    of the other text.

    Args:
        text: (T,) int32, from which keys and values are taken.
        between: (T,) int32, the other text.
        generator: Decides the pairs, their order and how much text is between.
        tokens: To write the list with.

    Returns:
        (T,) int32, or None if the text has too few different keys.
    """
    separator = tokens.separator
    if separator is None:  # the rarest, so that it excludes few keys and values
        found, counts = np.unique(text, return_counts=True)
        separator = int(found[counts.argmin()])
    left = len(text)
    pairs = _pairs(text, separator, tokens.avoided, generator)
    fewest = min(_PAIRS[0], left // (2 * _LONGEST_PAIR))
    if len(pairs) < fewest:
        return None
    parts, used = [], 0
    while (most := min(_PAIRS[1], len(pairs), left // (2 * _LONGEST_PAIR))) >= fewest:
        count = _uniform(fewest, most, generator)
        chosen, pairs = pairs[:count], pairs[count:]
        order = torch.randperm(count, generator=generator).tolist()
        if order == sorted(order):
            order = [*order[1:], order[0]]
        left -= 2 * sum(map(len, chosen))
        distance = _log_uniform(1, min(_DISTANCE[1], left), generator) if left else 0
        parts += [*chosen, between[used : used + distance], *(chosen[i] for i in order)]
        used += distance
        left -= distance
    return np.concatenate([*parts, between[used : used + left]])


def repeat_row(
    number: int,
    text: TokenRows,
    between: TokenRows,
    generator: torch.Generator,
    tokens: ListTokens,
) -> np.ndarray:
    """Build row `number`, (T,) int32: pairs where it is odd and the text has them, else passages.

    Args:
        number: Of the row.
        text: One row without padding, whose passages or pairs come back.
        between: One row, the text between the copies.
        generator: Decides all else.
        tokens: To write lists with.
    """
    ids, other = text.input_ids[0].numpy(), between.input_ids[0].numpy()
    if number % 2:
        row = pairs_row(ids, other, generator, tokens)
        if row is not None:
            return row
    return passages_row(ids, text.document_ids[0].numpy(), other, generator)


@dataclass(frozen=True)
class RepeatedRows:
    """Rows that repeat themselves (a `RowSource`), made from other rows when they are read.

    plain: The rows of all sources, concatenated, without padding, of 48 tokens or more.
    sizes: Rows of each source.
    schedule: Decides which source a row is made from.
    count: Number of rows; any number can be made.
    length: Tokens in a row (T).
    seed: Of the rows.
    list_tokens: To write lists with.
    """

    plain: RowSource
    sizes: Sequence[int]
    schedule: MixtureSchedule
    count: int
    length: int
    seed: int
    list_tokens: ListTokens

    def __len__(self) -> int:
        return self.count

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows; no row is padded."""
        return self.count * self.length

    def select(self, index: slice | Tensor) -> TokenRows:
        """Make some of the rows, by slice or by (n,) int64 indices."""
        numbers = range(self.count)[index] if isinstance(index, slice) else index.tolist()
        generators = [generator_of(self.seed, number) for number in numbers]
        # All of their text is read at once: a row for the copies, and one for what is between.
        drawn = [self._draw(generator) for generator in generators for _ in ("text", "between")]
        plain = self.plain.select(torch.tensor(drawn, dtype=torch.int64))
        rows = [
            repeat_row(
                number,
                plain.select(slice(2 * i, 2 * i + 1)),
                plain.select(slice(2 * i + 1, 2 * i + 2)),
                generator,
                self.list_tokens,
            )
            for i, (number, generator) in enumerate(zip(numbers, generators, strict=True))
        ]
        return one_document(np.stack(rows))

    def fingerprint(self) -> str:
        """Return the sha256 of the plain rows' fingerprint and all that decides the rows."""
        tokens = [self.list_tokens.separator, self.list_tokens.avoided]
        own = [_FORMAT, self.plain.fingerprint(), self.count, self.length, self.seed, tokens]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()

    def _draw(self, generator: torch.Generator) -> int:
        """Return the index of a plain row, from any source, by weight."""
        source, _ = self.schedule.locate(_uniform(0, 2**20, generator))
        return sum(self.sizes[:source]) + _uniform(0, self.sizes[source] - 1, generator)


def with_repeats(rows: TokenRows, share: float, seed: int, tokens: ListTokens) -> TokenRows:
    """Replace a share of the rows, evenly spread, by rows that repeat what they say.

    Args:
        rows: Without padding.
        share: 0 or more, less than 1.
        seed: Of the rows.
        tokens: To write lists with.

    Returns:
        As many rows. Rows of fewer than 48 tokens come back as they are.
    """
    length = rows.input_ids.shape[1]
    if share == 0 or length < SHORTEST_REPEATS:
        return rows
    schedule = MixtureSchedule([share, 1 - share])
    replaced = [row for row in range(len(rows)) if schedule.locate(row)[0] == 0]
    ids, documents = rows.input_ids.clone(), rows.document_ids.clone()
    for number, row in enumerate(replaced):
        generator = generator_of(seed, number)
        other = _uniform(0, len(rows) - 1, generator)
        text, between = (rows.select(slice(i, i + 1)) for i in (row, other))
        made = repeat_row(number, text, between, generator, tokens)
        ids[row], documents[row] = torch.from_numpy(made), 0
    return TokenRows(ids, documents, rows.lengths)


def one_document(ids: np.ndarray) -> TokenRows:
    """Return (n, T) int32 tokens as rows of one document each."""
    lengths = torch.full((len(ids),), ids.shape[1])
    return TokenRows(torch.from_numpy(ids), torch.zeros(ids.shape, dtype=torch.int32), lengths)


def generator_of(seed: int, number: int) -> torch.Generator:
    """Return the generator of one row. Hashed: neighbouring numbers give unrelated rows."""
    digest = hashlib.sha256(f"repeats {seed} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _passage(documents: np.ndarray, at: int, size: int, shortest: int) -> tuple[int, int]:
    """Return start and end of a passage of at most `size` tokens, from `at` on.

    It lies in the document at `at`, or in the next one, if that has `shortest` tokens of the row.
    """
    start = at
    for _ in range(2):
        if start >= len(documents):
            break
        end = int(np.searchsorted(documents, documents[start], side="right"))
        if end - start >= shortest:
            return start, min(end, start + size)
        start = end
    return at, at + size


def _pairs(
    text: np.ndarray, separator: int, avoided: tuple[int, ...], generator: torch.Generator
) -> list[np.ndarray]:
    """Return key, link, value and separator of each pair; no key comes twice."""
    width = max(_KEY[1], _VALUE[1])
    spans = text[: len(text) // width * width].reshape(-1, width)
    spans = spans[~np.isin(spans, [*avoided, separator]).any(axis=1)]
    spans = spans[torch.randperm(len(spans), generator=generator).numpy()]
    size, link = _uniform(*_KEY, generator), _uniform(*_LINK, generator)
    values = iter(spans[len(spans) // 2 :])
    between = next(values, spans[:0].reshape(-1))[:link]
    pairs: dict[bytes, np.ndarray] = {}
    end = np.array([separator], dtype=text.dtype)
    for key in spans[: (len(spans) - 1) // 2, :size]:
        if key.tobytes() not in pairs:
            value = next(values)[: _uniform(*_VALUE, generator)]
            pairs[key.tobytes()] = np.concatenate([key, between, value, end])
    return list(pairs.values())


def _uniform(lowest: int, highest: int, generator: torch.Generator) -> int:
    return int(torch.randint(lowest, highest + 1, (), generator=generator))


def _log_uniform(lowest: int, highest: int, generator: torch.Generator) -> int:
    drawn = float(torch.rand((), generator=generator, dtype=torch.float64))
    return min(highest, int(lowest * np.exp(drawn * log((highest + 1) / lowest))))
