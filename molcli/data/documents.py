"""Step 1, reading: from the name of a file or a Hub data set to an iterator of documents.

A document is a string, or a list of token ids where the source is already tokenized.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from molcli.errors import MolError

# File suffix -> name of the builder in `datasets`.
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
HUB = "hf://"
_HUB_SOURCE = re.compile(
    r"hf://(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:]*)(:(?P<split>[^:]+))?)?"
)
_HUB_SYNTAX = f"{HUB}ORG/NAME[:CONFIG[:SPLIT]], such as {HUB}org/name:default:train"


def read_documents(source: str) -> Iterator[str | list[int]]:
    """Read the documents of a file or of a data set on the Hub, lazily and in order.

    Each row with a field `input_ids` (list of integers) or `text` (string) is one document;
    `input_ids` wins where both exist. In a .txt file, blank lines separate documents. Empty
    documents are skipped.

    Args:
        source: Path of a .txt, .jsonl, .json or .parquet file, optionally compressed (.gz, .xz,
            .bz2, .zst); or hf://org/name[:config[:split]], streamed from the Hub. Without a config
            the data set's default is read, without a split `train`.

    Raises:
        MolError: On the call, if the file is missing or its type is not supported. On iteration,
            if it cannot be parsed, has no documents, or a row has neither field.
    """
    # Not a generator itself: the name is checked on the call, the content on iteration.
    return _non_empty(source, _rows(source))


def _non_empty(source: str, rows: Iterator[dict[str, Any]]) -> Iterator[str | list[int]]:
    found = 0
    for row in rows:
        document = _document(row, source)
        if len(document):
            found += 1
            yield document
    if not found:
        raise MolError(f"data `{source}` holds no text")


def _document(row: dict[str, Any], source: str) -> str | list[int]:
    ids, text = row.get("input_ids"), row.get("text")
    if isinstance(ids, list):
        return ids
    if isinstance(text, str):
        return text.strip()
    raise MolError(
        f"data `{source}` has a row with neither text nor tokens; its fields are "
        + ", ".join(f"`{name}`" for name in row),
        allowed="field `text` (a string) or `input_ids` (a list of integers)",
    )


def _rows(source: str) -> Iterator[dict[str, Any]]:
    """Check the name of a source and return an iterator of its rows."""
    if source.startswith(HUB):
        return _report_errors(source, _load_dataset(_hub_arguments(source)))
    arguments = _file_arguments(source)
    if Path(source).suffix == ".jsonl":
        return _report_errors(source, _json_lines(Path(source)))
    return _report_errors(source, _load_dataset(arguments))


def _hub_arguments(source: str) -> dict[str, Any]:
    match = _HUB_SOURCE.fullmatch(source)
    if match is None:
        raise MolError(
            f"data `{source}` is not the name of a data set on the Hub", allowed=_HUB_SYNTAX
        )
    name, config, split = match["name"], match["config"], match["split"]
    return {"path": name, "name": config or None, "split": split or "train"}


def _file_arguments(source: str) -> dict[str, Any]:
    path = Path(source)
    suffixes = path.suffixes[:-1] if path.suffix in COMPRESSIONS else path.suffixes
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in BUILDERS:
        allowed = ", ".join(BUILDERS) + f" (plain, or with {', '.join(COMPRESSIONS)}), "
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
    builder = BUILDERS[suffix]
    options = {"sample_by": "paragraph"} if builder == "text" else {}
    return {"path": builder, "data_files": source, "split": "train", **options}


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    # Without `datasets`, whose import takes seconds because it imports pandas and pyarrow; and rows
    # may differ in their fields' types.
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


def _load_dataset(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MolError(
            "reading text needs the library `datasets`, which is not installed",
            hint="pip install datasets",
        ) from error
    # Streaming avoids a second copy of the data in the Hugging Face cache.
    rows: Iterable[dict[str, Any]] = load_dataset(streaming=True, **arguments)
    yield from rows


def _report_errors(source: str, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows; turn any exception of the reader into a MolError."""
    try:
        yield from rows
    except MolError:
        raise
    except Exception as error:  # readers raise many types, and the file is the user's
        path = Path(source)
        if path.is_file() and path.stat().st_size == 0:
            return  # some readers raise on an empty file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "check the name and the network; for a gated data set: hf auth login"
        raise MolError(
            f"data `{source}` cannot be read: {reason}",
            hint=hint if source.startswith(HUB) else "",
        ) from error
