"""Where rows of text come from: a local file or a data set on the Hub, streamed."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from molcli.errors import MolError

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
        return _read(source, _streamed(_hub_arguments(source)))
    arguments = _file_arguments(source)
    if Path(source).suffix == ".jsonl":
        return _read(source, _json_lines(Path(source)))
    return _read(source, _streamed(arguments))


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


def _read(source: str, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
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
