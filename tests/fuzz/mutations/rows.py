"""Rows of data files: ids and texts that are none, odd text, rows of another kind."""

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.mutations.mutation import Effect, Mutation, NotApplicable

_IDS = [
    *(None, [], [[1, 2]], [1.5], [1.0], [None], [True], ["1"], "1 2", 5, 1.5, [-1], [128], [127]),
    *([10**30], [2**31], [2**63], [2**64], {"a": 1}, [1] * 100_000, [[]], [{}], [1, [2]], False),
]
_TEXTS = [
    *(None, "", " ", "\n", "   indented", "2020-01-01", "1e5", "NaN", 5, 1.5, True, [], ["a"], {}),
    *("\ud800", "a\udfff b", "\0", "\ufeff", "\u2028", "é" * 50_000, "the " * 50_000, "a\r\nb"),
    *("\x1b[2J", "\uffff", "<s></s>", "🙂" * 10),
]
_LINES = [
    *("", " ", "\t", "null", "5", "[]", '"text"', "{}", "{", "}", "nope", '{"text": NaN}', "\x00"),
    *('{"text": "a"} x', '{"text": "a"}{"text": "b"}', "[" * 100_000, "\ufeff", "\x1a", "[1, 2]"),
    *('{"text": "a", "text": 5}', '{"input_ids": 1e5}', '{"input_ids": [1e0]}', "// comment"),
    *('{"text": "' + "x" * 2_000_000 + '"}', "9" * 5000, '{"input_ids": [' + "9" * 5000 + "]}"),
    *('{"TEXT": "a"}', '{"text": "a", "extra": [[{}]]}', "'text'", '{"text": "\\ud83d"}'),
]


def _read(path: Path) -> tuple[str, Any]:
    """The content of a data file as text; parquet is changed as bytes only."""
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode(), gzip.compress
    if path.suffix == ".zst":
        import zstandard

        return zstandard.decompress(path.read_bytes()).decode(), zstandard.compress
    if path.suffix == ".parquet":
        raise NotApplicable
    return path.read_text(encoding="utf-8"), bytes


def _row(path: Path, draw: Random) -> str:
    """A value of a row."""
    values = {"input_ids": draw.choice(_IDS), "text": draw.choice(_TEXTS)}
    if path.suffix == ".parquet":
        return _parquet(path, draw, values)
    text, pack = _read(path)
    if path.suffix == ".txt":
        raise NotApplicable
    whole = path.suffix == ".json"
    rows = json.loads(text) if whole else [json.loads(line) for line in text.splitlines()]
    at = draw.choice([0, -1, draw.randrange(len(rows))])
    field = draw.choice([*rows[at], "input_ids", "text"])
    if draw.random() < 0.5:
        rows[at] = {field: values[field]}
    else:
        rows[at][field] = values[field]
    lines = [json.dumps(rows)] if whole else [json.dumps(row) for row in rows]
    path.write_bytes(pack("\n".join(lines).encode()))
    return f"{path.name}: row {at}: {field} := {values[field]!r:.60}"


def _parquet(path: Path, draw: Random, values: dict[str, Any]) -> str:
    """A column of other values."""
    import pyarrow
    from pyarrow import parquet

    field = draw.choice(sorted(values))
    try:
        table = pyarrow.table({field: [values[field]] * draw.choice([1, 3, 1000])})
        parquet.write_table(table, path)
    except (pyarrow.ArrowException, OverflowError, UnicodeError) as error:
        raise NotApplicable from error
    return f"{path.name}: {table.num_rows} rows of {field} {values[field]!r:.60}"


def _line(path: Path, draw: Random) -> str:
    """A line that is no row."""
    text, pack = _read(path)
    lines = text.split("\n")
    at, line = draw.choice([0, len(lines) - 1, draw.randrange(len(lines))]), draw.choice(_LINES)
    lines.insert(at, line)
    path.write_bytes(pack("\n".join(lines).encode()))
    return f"{path.name}: line {at}: {line!r:.60}"


def _encoding(path: Path, draw: Random) -> str:
    text, pack = _read(path)
    name = draw.choice(["utf-16", "utf-32", "utf-8-sig", "latin-1", "twice", "endless"])
    if name in ("twice", "endless"):
        content = text.encode() * (2 if name == "twice" else 2_000)
        content = content.replace(b"\n", b" ") if name == "endless" else content
    else:
        content = (text + "é").encode(name)
    path.write_bytes(pack(content))
    return f"{path.name}: {name}"


def _blank_lines(path: Path, draw: Random) -> str:
    """Lines of white space between rows, a byte-order mark, or CRLF."""
    text, pack = _read(path)
    if path.suffix == ".txt":
        raise NotApplicable
    way = draw.choice(["blank", "mark", "CRLF", "no last line break"])
    if way == "blank":
        text = text.replace("\n", draw.choice(["\n\n", "\n  \n", "\n\t\n"]))
    elif way == "mark":
        text = "\ufeff" + text
    elif way == "CRLF":
        text = text.replace("\n", "\r\n")
    else:
        text = text.rstrip("\n")
    path.write_bytes(pack(text.encode()))
    return f"{path.name}: {way}"


ROWS = [Mutation("row", _row), Mutation("line", _line)]
ENCODING = Mutation("encoding", _encoding)
BLANK_LINES = Mutation("blank lines", _blank_lines, Effect.HARMLESS)
