"""Documents from text, JSONL and Parquet files, and their tokens.

A document is a string, or a list of token ids where the file is already tokenised. In a .txt file
a blank line ends a document, as in `datasets`' sample_by="paragraph"; longer documents that hold
blank lines belong in a JSONL or Parquet file, one a row: field "input_ids", else field "text".
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molcli.errors import MolError
from molcli.progress import Progress, silent

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
TOKENIZER_BATCH = 256  # documents: enough to keep the tokenizer's threads busy


def read_documents(data: str) -> Iterator[str | list[int]]:
    """The documents of a local file in its own order, read as they are asked for.

    data: path of a .txt, .jsonl, .json or .parquet file, which may end in .gz, .xz, .bz2 or .zst.
    Raises MolError if the file is missing, of another kind, empty, unreadable, or without either
    field. The path is checked at once, the content on iteration.
    """
    return _read(data, _builder(data))


def _builder(data: str) -> str:
    path = Path(data)
    suffixes = path.suffixes[:-1] if path.suffix in COMPRESSIONS else path.suffixes
    kind = suffixes[-1] if suffixes else ""
    if kind not in BUILDERS:
        allowed = ", ".join(BUILDERS) + f" (plain, or with {', '.join(COMPRESSIONS)})"
        raise MolError(f"data `{data}` is not a kind of file that can be read", allowed=allowed)
    if not path.is_file():
        raise MolError(f"data `{data}` does not exist", hint="a path to a local file")
    return BUILDERS[kind]


def _read(data: str, builder: str) -> Iterator[str | list[int]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MolError(
            "reading text needs the library `datasets`, which is not installed",
            hint="pip install datasets",
        ) from error
    options = {"sample_by": "paragraph"} if builder == "text" else {}
    found = 0
    try:
        # Streaming: no second copy of the corpus in the Hugging Face cache.
        rows = load_dataset(builder, data_files=data, split="train", streaming=True, **options)
        for row in rows:
            document = _document(row, data)
            if len(document):
                found += 1
                yield document
    except MolError:
        raise
    except Exception as error:  # whatever the format's reader raises: the file is the user's
        if Path(data).stat().st_size:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MolError(f"data `{data}` cannot be read: {reason}") from error
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
    progress: Progress = silent,
) -> list[Tensor]:
    """Token ids of each document, (tokens,) int32.

    Strings get the special tokens that the tokenizer puts at the start, and its EOS at the end;
    token lists are taken as they are. limit: stops after so many tokens, cutting the last document.
    Raises MolError on a string without a tokenizer, and on an id outside vocab_size.
    """
    tokens: list[Tensor] = []
    count = 0
    documents = iter(documents)
    while batch := list(islice(documents, TOKENIZER_BATCH)):
        for ids in _batch_ids(batch, tokenizer):
            if limit is not None:
                ids = ids[: limit - count]
            _check_ids(ids, vocab_size)
            tokens.append(ids)
            count += len(ids)
            if count == limit:
                progress(count, limit)
                return tokens
        progress(count, limit)
    return tokens


def _batch_ids(
    batch: list[str | list[int]], tokenizer: PreTrainedTokenizerBase | None
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
        encoded = (row if row[-1:] == eos else row + eos for row in ids)
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
