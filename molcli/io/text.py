"""Documents from text, JSONL and Parquet files or the Hub, and their tokens.

A document is a string, or a list of token ids where the file is already tokenised. In a .txt file
a blank line ends a document, as in `datasets`' sample_by="paragraph"; longer documents that hold
blank lines belong in a JSONL or Parquet file, one a row: field "input_ids", else field "text".
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molcli.errors import MolError
from molcli.io.sources import source_rows
from molcli.progress import Progress, silent

TOKENIZER_BATCH = 256  # documents: enough to keep the tokenizer's threads busy


def read_documents(data: str) -> Iterator[str | list[int]]:
    """The documents of a file or a data set on the Hub, read as they are asked for.

    data: as for `source_rows`. Raises MolError as that does, and if there is not one document or a
    row has neither field.
    """
    return _read(data, source_rows(data))


def _read(data: str, rows: Iterator[dict[str, Any]]) -> Iterator[str | list[int]]:
    found = 0
    for row in rows:
        document = _document(row, data)
        if len(document):
            found += 1
            yield document
    if not found:
        raise MolError(f"data `{data}` holds no text")


def _document(row: dict[str, Any], data: str) -> str | list[int]:
    ids, text = row.get("input_ids"), row.get("text")
    if isinstance(ids, list):
        return ids
    if isinstance(text, str):
        return text.strip()
    raise MolError(
        f"data `{data}` has a row with neither text nor tokens; its fields are "
        + ", ".join(f"`{name}`" for name in row),
        allowed="field `text` (a string) or `input_ids` (a list of integers)",
    )


def tokenize(
    documents: Iterable[str | list[int]],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    limit: int | None = None,
    whole: bool = True,
    progress: Progress = silent,
) -> Iterator[Tensor]:
    """Token ids of each document, (tokens,) int32, as they are asked for.

    Strings get the special tokens that the tokenizer puts at the start, and its EOS at the end;
    token lists are taken as they are. limit: stops after so many tokens, cutting the last document.
    whole: false for texts that something follows, which get no EOS.
    Raises MolError on a string without a tokenizer, and on an id outside vocab_size.
    """
    count = 0
    documents = iter(documents)
    while batch := list(islice(documents, TOKENIZER_BATCH)):
        for ids in _batch_ids(batch, tokenizer, whole):
            if limit is not None:
                ids = ids[: limit - count]
            _check_ids(ids, vocab_size)
            yield ids
            count += len(ids)
            if count == limit:
                progress(count, limit)
                return
        progress(count, limit)


def _batch_ids(
    batch: list[str | list[int]], tokenizer: PreTrainedTokenizerBase | None, whole: bool
) -> Iterator[Tensor]:
    """Token ids of a batch, in its order: strings through the tokenizer in one call."""
    texts = [document for document in batch if isinstance(document, str)]
    encoded: Iterator[list[int]] = iter(())
    if texts:
        if tokenizer is None:
            raise MolError(
                "the data is text, but this model has no tokenizer",
                allowed="rows with a field `input_ids`, or a model folder with a tokenizer",
            )
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = tokenizer(texts, verbose=False)["input_ids"]
        bare = (row[:-1] if eos and row[-1:] == eos else row for row in ids)
        encoded = (row + eos for row in bare) if whole else bare
    for document in batch:
        row = next(encoded) if isinstance(document, str) else document
        yield torch.tensor(row, dtype=torch.int32)


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise MolError(
            f"the data has token id {int(ids.max() if ids.min() >= 0 else ids.min())}, "
            f"but the model's vocabulary has {vocab_size} entries",
            hint="data tokenised for this model, or plain text",
        )
