"""Step 1, reading: from the name of a file or a Hub data set to an iterator of documents.

A document is a string, or a list of token ids where the source is already tokenized.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from molcli.data.readers import COMPRESSIONS, FIELDS, READERS, Row
from molcli.errors import Interrupted, MolError
from molcli.files.json_files import shortened

HUB = "hf://"
MAX_IDS = 2**31  # ids are stored as int32
_HUB_SOURCE = re.compile(
    r"hf://(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:]*)(:(?P<split>[^:]+))?)?"
)
_HUB_SYNTAX = f"{HUB}ORG/NAME[:CONFIG[:SPLIT]], such as {HUB}org/name:default:train"
_ALLOWED = "a field `text` (a string) or `input_ids` (a list of integers)"
_BLANK_LINES = re.compile(r"(?:[^\S\n]*\n)+")


def read_documents(source: str, *, vocab_size: int = MAX_IDS) -> Iterator[str | list[int]]:
    """Read the documents of a file or of a data set on the Hub, lazily and in order.

    Each row with a field `input_ids` (list of integers) or `text` (string) is one document;
    `input_ids` wins where both exist, and a field that is null counts as missing. In a .txt file,
    blank lines separate documents. Blank lines at the start of a text and white space at its end
    are removed; indentation of its first line is kept. Empty documents are skipped.

    Args:
        source: Path of a .txt, .jsonl, .json or .parquet file, optionally compressed (.gz, .xz,
            .bz2, .zst), never a pattern; or hf://org/name[:config[:split]], streamed from the Hub.
            Without a config the data set's default is read, without a split `train`.
        vocab_size: Ids in the source must be below it.

    Raises:
        MolError: On the call, if the file is missing or its type is not supported. On iteration,
            if it cannot be parsed, has no documents, or a row has no usable field.
    """
    # Not a generator itself: the name is checked on the call, the content on iteration.
    return _non_empty(source, _rows(source), vocab_size)


def _non_empty(source: str, rows: Iterator[Row], vocab_size: int) -> Iterator[str | list[int]]:
    found = 0
    for place, row in rows:
        document = _document(row, f"data `{source}`, {place}", vocab_size)
        if len(document):
            found += 1
            yield document
    if not found:
        raise MolError(f"data `{source}` holds no text")


def _document(row: dict[str, Any], place: str, vocab_size: int) -> str | list[int]:
    """Return the document of a row; `place` names file and row in messages."""
    ids, text = row.get("input_ids"), row.get("text")
    if ids is not None:
        return _checked_ids(ids, place, vocab_size)
    if isinstance(text, str):
        return _checked_text(text, place)
    if text is not None:
        raise MolError(f"{place}: `text` is {_described(text)}", allowed=_ALLOWED)
    null = [f"`{name}`" for name in FIELDS if name in row]
    if null:
        raise MolError(f"{place}: {' and '.join(null)} is null", allowed=_ALLOWED)
    names = shortened(", ".join(f"`{name}`" for name in row), 200) or "none"
    raise MolError(
        f"{place}: there is neither text nor tokens; its fields are {names}", allowed=_ALLOWED
    )


def _checked_text(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MolError(
            f"{place}: `text` has half of a character, U+{ord(text[error.start]):04X}, "
            f"at position {error.start}",
            allowed="text that can be written as UTF-8: surrogates in pairs only",
        ) from error
    text = text.rstrip()
    blank = _BLANK_LINES.match(text)
    return text if blank is None else text[blank.end() :]


def _checked_ids(ids: Any, place: str, vocab_size: int) -> list[int]:
    if not isinstance(ids, list):
        raise MolError(f"{place}: `input_ids` is {_described(ids)}", allowed=_ALLOWED)
    # Not isinstance: true and false are no ids.
    if not set(map(type, ids)) <= {int}:
        at = next(i for i, token in enumerate(ids) if type(token) is not int)
        raise MolError(
            f"{place}: `input_ids` has {_described(ids[at])} at position {at}", allowed=_ALLOWED
        )
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise MolError(
            f"{place}: `input_ids` has token id {shortened(wrong)}, "
            f"but the model's vocabulary has {vocab_size} entries",
            allowed=f"ids from 0 to {vocab_size - 1}",
            hint="data tokenised for this model, or plain text",
        )
    return ids


def _described(value: Any) -> str:
    """Name the type and value of a field, such as "3.5 (a fractional number)"."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a fractional number", list: "a list"}
    kind = names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)
    return f"{shortened(value)} ({kind})"


def _rows(source: str) -> Iterator[Row]:
    """Check the name of a source and return an iterator of its rows."""
    if source.startswith(HUB):
        return _report_errors(source, _hub_rows(_hub_arguments(source)))
    path, suffix = Path(source), _suffix(source)
    if suffix not in READERS:
        allowed = ", ".join(READERS) + f" (plain, or with {', '.join(COMPRESSIONS)}), "
        hub_name = not path.exists() and _HUB_SOURCE.fullmatch(HUB + source) and "/" in source
        raise MolError(
            f"data `{source}` is not a supported type of file",
            allowed=f"{allowed}a folder of `molcli data tokenize`, or {_HUB_SYNTAX}",
            hint=f"{HUB}{source} for the data set on the Hub" if hub_name else "",
        )
    if not path.is_file():
        raise MolError(
            f"data `{source}` does not exist", hint=f"a path to a local file, or {_HUB_SYNTAX}"
        )
    return _report_errors(source, READERS[suffix](path))


def _suffix(source: str) -> str:
    """Return the suffix that says what the file holds: the one before that of a compression."""
    path = Path(source)
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _hub_arguments(source: str) -> dict[str, Any]:
    match = _HUB_SOURCE.fullmatch(source)
    if match is None:
        raise MolError(
            f"data `{source}` is not the name of a data set on the Hub", allowed=_HUB_SYNTAX
        )
    name, config, split = match["name"], match["config"], match["split"]
    return {"path": name, "name": config or None, "split": split or "train"}


def _hub_rows(arguments: dict[str, Any]) -> Iterator[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MolError(
            "reading data from the Hub needs the library `datasets`, which is not installed",
            hint="pip install datasets",
        ) from error
    # Streaming avoids a second copy of the data in the Hugging Face cache.
    rows: Iterable[dict[str, Any]] = load_dataset(streaming=True, **arguments)
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _report_errors(source: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows; turn any exception of the reader into a MolError."""
    try:
        yield from rows
    except (MolError, Interrupted, MemoryError):
        raise
    except Exception as error:  # readers raise many types, and the file is the user's
        path = Path(source)
        if path.is_file() and path.stat().st_size == 0:
            return  # some readers raise on an empty file
        reason = shortened((str(error).splitlines() or [type(error).__name__])[0], 300)
        hint = "check the name and the network; for a gated data set: hf auth login"
        raise MolError(
            f"data `{source}` cannot be read: {reason}",
            hint=hint if source.startswith(HUB) else "",
        ) from error
