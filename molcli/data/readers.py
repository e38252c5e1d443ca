"""Rows of local files: .txt, .jsonl, .json and .parquet, plain or compressed.

Every reader yields (place, row): "line 3" or "row 3" for messages, and the fields of the row. All
readers give the same rows for the same documents: values keep the type that the file gives them, a
byte-order mark is dropped, and text is split at line ends only (\\n, \\r\\n, \\r).
"""

import bz2
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

FIELDS = ("input_ids", "text")
# Above any document that a tokenizer can process. A compressed file of a few kB can hold more.
MAX_BYTES = 2**28
_TOO_LARGE = f"has over {MAX_BYTES:,} bytes, which is too large for one document"
_CHUNK = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")

Row = tuple[str, dict[str, Any]]


def text_rows(path: Path) -> Iterator[Row]:
    """Yield the documents of a text file, which blank lines separate, as the field `text`."""
    lines: list[str] = []
    first, size = 1, 0
    for number, line in _lines(path):
        if line and not line.isspace():
            if not lines:
                first, size = number, 0
            lines.append(line)
            size += len(line)
            if size > MAX_BYTES:
                raise ValueError(f"the document from line {first} on {_TOO_LARGE}")
        elif lines:
            yield f"line {first}", {"text": "\n".join(lines)}
            lines = []
    if lines:
        yield f"line {first}", {"text": "\n".join(lines)}


def json_line_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of a file with one JSON object a line; blank lines are skipped."""
    for number, line in _lines(path):
        if not line or line.isspace():
            continue
        try:
            row = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        yield f"line {number}", row


def json_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON file: an array of objects or of strings, or objects one by one."""
    number = 0
    with _open(path) as file:
        values = _Values(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
        if values.skip("["):
            ended = values.skip("]")
            while not ended:
                number += 1
                row = values.read(number)
                yield _json_row(number, {"text": row} if isinstance(row, str) else row)
                ended = values.skip("]")
                if not ended and not values.skip(","):
                    raise ValueError(f"neither a comma nor the array's end follows row {number}")
            if not values.at_end():
                raise ValueError("something follows the end of the array")
        while not values.at_end():
            number += 1
            yield _json_row(number, values.read(number))


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file, of which only the fields of documents are read."""
    import pyarrow.parquet

    with tempfile.TemporaryFile() as copy, _open(path) as file:
        if path.suffix in COMPRESSIONS:  # the format needs a file in which it can seek
            shutil.copyfileobj(file, copy)
            file = cast(BinaryIO, copy)
        parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        names = parquet.schema_arrow.names
        fields = [name for name in names if name in FIELDS]
        if not fields and parquet.metadata.num_rows:
            yield "row 1", dict.fromkeys(names)
        number = 0
        for batch in parquet.iter_batches(batch_size=256, columns=fields):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            for i in range(batch.num_rows):
                number += 1
                try:
                    row = {name: column[i].as_py() for name, column in columns.items()}
                except ValueError as error:
                    raise ValueError(f"row {number} cannot be read ({error})") from error
                yield f"row {number}", row


class _Values:
    """JSON values of a text, one after another, of which a part is in memory at a time."""

    def __init__(self, text: io.TextIOBase) -> None:
        self._text, self._buffer, self._at = text, "", 0

    def at_end(self) -> bool:
        """Skip white space and return whether nothing follows."""
        while True:
            space = _SPACE.match(self._buffer, self._at)
            assert space is not None  # it matches "", too
            self._at = space.end()
            if self._at < len(self._buffer):
                return False
            if not self._read_more(_CHUNK):
                return True

    def skip(self, mark: str) -> bool:
        """Skip white space, and a mark of one character if it follows; return whether it did."""
        found = not self.at_end() and self._buffer[self._at] == mark
        self._at += found
        return found

    def read(self, number: int) -> Any:
        """Read the next value, an object or a string; other values are not read to their end."""
        if self.at_end():
            raise ValueError(f"the file ends where row {number} should be")
        while True:
            try:
                value, self._at = _DECODER.raw_decode(self._buffer, self._at)
                return value
            except json.JSONDecodeError as error:
                # Reading as much again as there is keeps the work linear in the value's length.
                rest = len(self._buffer) - self._at
                if rest > MAX_BYTES:
                    raise ValueError(f"row {number} {_TOO_LARGE}") from error
                if not self._may_go_on(error) or not self._read_more(max(rest, _CHUNK)):
                    raise ValueError(f"row {number} is not JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"row {number} is not JSON ({error})") from error

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether an error may come from the end of the buffer within a value."""
        near_end = error.pos > len(self._buffer) - 16  # longer than any word or escape of JSON
        return near_end or error.msg.startswith("Unterminated string")

    def _read_more(self, size: int) -> bool:
        more = self._text.read(size)
        self._buffer, self._at = self._buffer[self._at :] + more, 0
        return bool(more)


def _json_row(number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"row {number} is not a JSON object")
    return f"row {number}", row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; refuse one in which a field of documents is ambiguous."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        for field in FIELDS:
            if names.count(field) > 1:
                raise ValueError(f"`{field}` comes twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line without its end) of a file in UTF-8.

    Decoding each line shows which one is at fault. str.splitlines would split at U+2028, too.
    """
    number = 0
    with _open(path) as file:
        while line := file.readline(MAX_BYTES + 1):
            if len(line) > MAX_BYTES:
                raise ValueError(f"line {number + 1} {_TOO_LARGE}")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number + 1} is not UTF-8 ({error})") from error
            text = text.removesuffix("\n").removesuffix("\r")
            if number == 0:
                text = text.removeprefix("\ufeff")
            for part in text.split("\r"):
                number += 1
                yield number, part


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; its suffix says whether it is compressed."""
    with path.open("rb") as file:
        opener = COMPRESSIONS.get(path.suffix)
        if opener is None:
            yield file
        else:
            with opener(file) as content:
                yield content


class _ZstdFile(io.RawIOBase):
    """The content of a file of one or more Zstandard frames.

    zstandard's own reader takes a truncated file for a whole one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder: Any = None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._output:
            # A kB can hold some 30 MB.
            data = self._input or self._file.read(1024)
            if not data:
                if self._decoder is not None and not self._decoder.eof:
                    raise EOFError("the compressed file ends too early")
                return 0
            if self._decoder is None or self._decoder.eof:
                self._decoder = zstandard.ZstdDecompressor().decompressobj()
            self._output = memoryview(self._decoder.decompress(data))
            self._input = self._decoder.unused_data if self._decoder.eof else b""
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count


# Suffix -> function that opens the content of a compressed file.
COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
    ".zst": lambda file: io.BufferedReader(_ZstdFile(file)),
}
# Suffix -> reader.
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": text_rows,
    ".jsonl": json_line_rows,
    ".json": json_rows,
    ".parquet": parquet_rows,
}
