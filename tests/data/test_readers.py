"""All readers give the same documents, and refuse files that are damaged."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from molcli.data.documents import read_documents
from molcli.errors import MolError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: zstandard.ZstdCompressor().compress(content),
}
TEXTS = [
    "2024-01-01",
    "    def f():\n\treturn 1",
    "12",
    "one\u2028line\x85of\x0btext\x1cand\ufeffmore",
    "null",
    " é 🙂\u00a0x",
    "1e5",
]


def as_text(texts: list[str], end: str = "\n", blank: str = "", mark: str = "") -> bytes:
    lines = [line for text in texts for line in (*text.split("\n"), blank, blank)]
    return (mark + end.join(lines)).encode()


def as_lines(texts: list[str], end: str = "\n", blank: str = "", mark: str = "") -> bytes:
    rows = [json.dumps({"text": text}, ensure_ascii=False) + end + blank + end for text in texts]
    return (mark + "".join(rows)).encode()


def as_array(texts: list[str], mark: str = "") -> bytes:
    rows = [{"text": text, "n": [{"a": i}]} for i, text in enumerate(texts)]
    return (mark + json.dumps(rows, indent=1)).encode()


def as_parquet(texts: list[Any], **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), sink, **options)
    return sink.getvalue().to_pybytes()


FORMS = {
    "plain.txt": as_text(TEXTS),
    "mark.txt": as_text(TEXTS, mark="\ufeff"),
    "windows.txt": as_text(TEXTS, end="\r\n"),
    "spaces.txt": as_text(TEXTS, blank=" \t "),
    "old.txt": as_text(TEXTS, end="\r"),
    "plain.jsonl": as_lines(TEXTS),
    "mark.jsonl": as_lines(TEXTS, mark="\ufeff"),
    "windows.jsonl": as_lines(TEXTS, end="\r\n", blank="  "),
    "escaped.jsonl": b"\n".join(json.dumps({"text": text}).encode() for text in TEXTS),
    "lines.json": as_lines(TEXTS, mark="\ufeff"),
    "array.json": as_array(TEXTS),
    "mark.json": as_array(TEXTS, mark="\ufeff"),
    "strings.json": json.dumps(TEXTS).encode(),
    "pretty.json": "\n".join(json.dumps({"text": text}, indent=2) for text in TEXTS).encode(),
    "plain.parquet": as_parquet(TEXTS),
    "large.parquet": as_parquet(pa.array(TEXTS, pa.large_string())),
    "dictionary.parquet": as_parquet(pa.array(TEXTS).dictionary_encode(), row_group_size=2),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", FORMS)
def test_all_files_of_the_same_documents_agree(tmp_path: Path, name: str, compression: str) -> None:
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](FORMS[name]))
    assert list(read_documents(str(path))) == TEXTS


@pytest.mark.parametrize("kind", [pa.int64(), pa.int8(), pa.uint16(), pa.uint64()])
def test_tokens_and_text_may_alternate_in_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    ids = pa.array([[5, 6], None, []], pa.large_list(kind))
    pq.write_table(
        pa.table({"input_ids": ids, "text": [None, "one", None]}), tmp_path / "a.parquet"
    )
    assert list(read_documents(str(tmp_path / "a.parquet"))) == [[5, 6], "one"]


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ({"text": ["a", None]}, "row 2: `text` is null"),
        ({"text": [1, 2]}, r"row 1: `text` is 1 \(a number\)"),
        ({"text": pa.array([0], pa.timestamp("s"))}, "row 1: `text` is 1970"),
        ({"text": [b"a"]}, r"row 1: `text` is b'a' \(bytes\)"),
        ({"text": pa.array([b"a", b"\xff"]).view(pa.string())}, "row 2 cannot be read"),
        ({"input_ids": [[1], [1.5]]}, "row 1: `input_ids` has 1.0"),
        ({"input_ids": [[1], [2, None]]}, "row 2: `input_ids` has null at position 1"),
        ({"input_ids": [[[1]]]}, "row 1: `input_ids` has .1. .a list."),
        ({"body": ["x"], "n": [1]}, "row 1: .* its fields are `body`, `n`"),
        ({"text": pa.array([], pa.string())}, "holds no text"),
    ],
)
def test_parquet_with_other_columns_is_refused(
    tmp_path: Path, column: dict[str, Any], found: str
) -> None:
    pq.write_table(pa.table(column), tmp_path / "a.parquet")
    with pytest.raises(MolError, match=f"a.parquet`.*{found}"):
        list(read_documents(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("twice.jsonl", '{"text": "a", "text": "b"}', "line 1 is not JSON .`text` comes twice"),
        ("deep.jsonl", '{"text": ' + "[" * 10**5, "line 1 is not JSON"),
        ("deep.json", "[" + '{"a":' * 10**5, "row 1 is not JSON"),
        ("cut.jsonl", '{"text": "a"}\n{"text": "b', "line 2 is not JSON"),
        ("cut.json", '[{"text": "a"}, {"text": "b', "row 2 is not JSON .Unterminated"),
        ("open.json", '[{"text": "a"}', "neither a comma nor the array's end follows row 1"),
        ("comma.json", '[{"text": "a"},', "the file ends where row 2 should be"),
        ("more.json", '[{"text": "a"}] x', "something follows the end of the array"),
        ("word.json", '[{"text": "a"}, nul]', "row 2 is not JSON"),
        ("number.json", "[3]", "row 1 is not a JSON object"),
        ("bare.json", '"text"', "row 1 is not a JSON object"),
        ("columns.json", '{"text": ["a", "b"]}', "row 1: `text` is"),
        ("marks.json", b'\xef\xbb\xbf[{"text": "\xff"}]', "codec"),
        ("utf16.txt", "text".encode("utf-16"), "line 1 is not UTF-8"),
        ("latin.txt", b"one\n\n\ntw\xe9\n", "line 4 is not UTF-8"),
        ("surrogate.txt", b"\xed\xa0\x80", "line 1 is not UTF-8"),
        ("renamed.txt.gz", b"text", "cannot be read: Not a gzipped file"),
        ("renamed.txt.zst", b"text", "cannot be read"),
        ("renamed.parquet", b"text", "cannot be read"),
        ("empty.jsonl.gz", b"", "holds no text"),
        ("empty.json", b" ", "holds no text"),
        ("none.json", "[ ]", "holds no text"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_refused(
    tmp_path: Path, name: str, content: str | bytes, found: str
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(MolError, match=f"{name}`.*{found}"):
        list(read_documents(str(tmp_path / name)))


@pytest.mark.parametrize("compression", [name for name in COMPRESS if name])
def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path: Path, compression: str) -> None:
    whole = COMPRESS[compression](as_lines(TEXTS * 3))
    path = tmp_path / f"rows.jsonl{compression}"
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(MolError, match="cannot be read"):
            list(read_documents(str(path)))


def test_a_truncated_or_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    whole = as_parquet(
        TEXTS * 3, compression="none", write_page_checksum=True, use_dictionary=False
    )
    path = tmp_path / "rows.parquet"
    for length in range(1, len(whole), 31):
        path.write_bytes(whole[:length])
        with pytest.raises(MolError, match="cannot be read"):
            list(read_documents(str(path)))
    at = whole.index(b"null")  # neither the smallest nor the largest text, which the header has
    path.write_bytes(whole[:at] + b"m" + whole[at + 1 :])
    with pytest.raises(MolError, match="cannot be read"):
        list(read_documents(str(path)))


def test_several_frames_of_one_file_are_read_to_the_end(tmp_path: Path) -> None:
    parts = [as_lines(TEXTS), as_lines(TEXTS[:2])]
    for name, compress in COMPRESS.items():
        path = tmp_path / f"rows.jsonl{name}"
        path.write_bytes(b"".join(map(compress, parts)))
        assert list(read_documents(str(path))) == TEXTS + TEXTS[:2]


def test_a_document_larger_than_what_is_read_at_once(tmp_path: Path) -> None:
    texts = ["x" * 3_000_000, "y" * 5, "é" * 2_000_000]
    for name, content in {
        "a.json": as_array(texts),
        "a.jsonl.zst": COMPRESS[".zst"](as_lines(texts)),
        "a.txt.gz": gzip.compress(as_text(texts)),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert list(read_documents(str(tmp_path / name))) == texts
    wrong = b'[{"text": "a"}, {"text" 3}, ' + b'{"text": "a"}, ' * 300_000
    (tmp_path / "wrong.json").write_bytes(wrong)
    with pytest.raises(MolError, match=r"row 2 is not JSON .Expecting ':' delimiter"):
        list(read_documents(str(tmp_path / "wrong.json")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_small_file_cannot_claim_gigabytes(tmp_path: Path, name: str) -> None:
    compressor = zstandard.ZstdCompressor(level=19).compressobj()
    path = tmp_path / f"{name}.zst"
    with path.open("wb") as file:
        file.write(compressor.compress(b'{"text": "'))
        for _ in range(300):
            file.write(compressor.compress(b"a" * 2**20))
        file.write(compressor.flush())
    assert path.stat().st_size < 2**20
    with pytest.raises(MolError, match=r"too large for one document|not JSON"):
        list(read_documents(str(path)))
