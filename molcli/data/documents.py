"""Read documents from files and from the Hub, and turn them into tokens."""

import json
import re
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
HUB = "hf://"
_HUB_SOURCE = re.compile(
    r"hf://(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:]*)(:(?P<split>[^:]+))?)?"
)
_HUB_SPELLING = f"{HUB}ORG/NAME[:CONFIG[:SPLIT]], such as {HUB}org/name:default:train"


def source_rows(source: str) -> Iterator[dict[str, Any]]:
    """The rows of a source, in its own order; a document of a .txt file is a row `text`.

    source: path of a .txt, .jsonl, .json or .parquet file, which may end in .gz, .xz, .bz2 or
    .zst; or hf://org/name[:config[:split]], streamed from the Hub (an empty or missing config is
    the data set's own default, a missing split `train`).
    Raises MolError if it is missing, of another kind, or unreadable. The name is checked at once,
    the content on iteration. A file without bytes has no rows.
    """
    if source.startswith(HUB):
        return _read_local(source, _streamed(_hub_arguments(source)))
    arguments = _file_arguments(source)
    if Path(source).suffix == ".jsonl":
        return _read_local(source, _json_lines(Path(source)))
    return _read_local(source, _streamed(arguments))


def _hub_arguments(source: str) -> dict[str, Any]:
    match = _HUB_SOURCE.fullmatch(source)
    if match is None:
        raise MolError(f"data `{source}` names no data set on the Hub", allowed=_HUB_SPELLING)
    name, config, split = match["name"], match["config"], match["split"]
    return {"path": name, "name": config or None, "split": split or "train"}


def _file_arguments(source: str) -> dict[str, Any]:
    path = Path(source)
    suffixes = path.suffixes[:-1] if path.suffix in COMPRESSIONS else path.suffixes
    kind = suffixes[-1] if suffixes else ""
    if kind not in BUILDERS:
        allowed = ", ".join(BUILDERS) + f" (plain, or with {', '.join(COMPRESSIONS)}), "
        hub_like = not path.exists() and _HUB_SOURCE.fullmatch(HUB + source) and "/" in source
        raise MolError(
            f"data `{source}` is not a kind of file that can be read",
            allowed=f"{allowed}a folder of `molcli data tokenize`, or {_HUB_SPELLING}",
            hint=f"{HUB}{source} for the data set on the Hub" if hub_like else "",
        )
    if not path.is_file():
        raise MolError(
            f"data `{source}` does not exist", hint=f"a path to a local file, or {_HUB_SPELLING}"
        )
    builder = BUILDERS[kind]
    options = {"sample_by": "paragraph"} if builder == "text" else {}
    return {"path": builder, "data_files": source, "split": "train", **options}


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Without `datasets`, whose import takes seconds: it brings pandas and pyarrow."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            yield row


def _streamed(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MolError(
            "reading text needs the library `datasets`, which is not installed",
            hint="pip install datasets",
        ) from error
    # Streaming: no second copy of the corpus in the Hugging Face cache.
    rows: Iterable[dict[str, Any]] = load_dataset(streaming=True, **arguments)
    yield from rows


def _read_local(source: str, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except MolError:
        raise
    except Exception as error:  # whatever the format's reader raises: the file is the user's
        path = Path(source)
        if path.is_file() and path.stat().st_size == 0:
            return  # some of the readers take an empty file for a broken one
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "check the name and the network; for a gated data set: hf auth login"
        raise MolError(
            f"data `{source}` cannot be read: {reason}",
            hint=hint if source.startswith(HUB) else "",
        ) from error


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
