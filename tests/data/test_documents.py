"""Reading documents."""

import json
import lzma
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from molcli.data.documents import read_documents
from molcli.errors import MolError


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.xz"])
def test_jsonl_gives_one_document_a_row(tmp_path: Path, name: str) -> None:
    data = write_jsonl(tmp_path / name, [{"text": "one\n\nstill one", "n": 1}, {"text": "two"}])
    assert list(read_documents(data)) == ["one\n\nstill one", "two"]


def test_files_need_no_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    rows = [{"text": "één", "n": 1}, {"n": ["of", "another", "type"], "input_ids": [5]}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert list(read_documents(data)) == ["één", [5]]
    assert list(read_documents(write_jsonl(tmp_path / "rows.jsonl.xz", rows))) == ["één", [5]]
    with pytest.raises(MolError, match="needs the library `datasets`"):
        list(read_documents("hf://org/name"))


def test_token_ids_win_over_text(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "abc", "input_ids": [5, 6]}])
    assert list(read_documents(data)) == [[5, 6]]


def test_parquet_gives_one_document_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"input_ids": [[5, 6], [7]], "id": ["x", "y"]}), path)
    assert list(read_documents(str(path))) == [[5, 6], [7]]


def test_blank_lines_end_a_text_document(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("one\nstill one\n\n\n\ntwo\n\n")
    assert list(read_documents(str(path))) == ["one\nstill one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("gone.txt", None, "does not exist"),
        ("weights.bin", "x", "not a supported type of file"),
        ("corpus", "x", "not a supported type of file"),
        ("empty.txt", "", "holds no text"),
        ("blank.txt", "\n\n \n", "holds no text"),
        ("empty.jsonl", "", "holds no text"),
        ("other.jsonl", '{"body": "x"}\n', "its fields are `body`"),
        ("number.jsonl", '{"text": 3}\n', "line 1: `text` is 3 "),
        ("broken.jsonl", '{"text": "x"}\n\n{"text": "x"\n', "cannot be read: line 3 is not JSON"),
        ("list.jsonl", '["x"]\n', "cannot be read: line 1 is not a JSON object"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', "cannot be read: line 1 is not UTF-8"),
        ("broken.parquet", "PAR0", "cannot be read"),
    ],
)
def test_unusable_data_is_refused(
    tmp_path: Path, name: str, content: str | bytes | None, found: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(MolError, match=found):
        list(read_documents(str(tmp_path / name)))


def test_white_space_before_a_text_keeps_its_indentation(tmp_path: Path) -> None:
    text = "\n  \n    def f():\n        return 1  \n\n"
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": text}, {"text": " one"}, {"text": "\n "}])
    assert list(read_documents(data)) == ["    def f():\n        return 1", " one"]


def test_a_null_field_counts_as_missing(tmp_path: Path) -> None:
    rows = [{"text": None, "input_ids": [5]}, {"text": "one", "input_ids": None}, {"text": ""}]
    assert list(read_documents(write_jsonl(tmp_path / "rows.jsonl", rows))) == [[5], "one"]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"input_ids": [3, [4]]}, r"`input_ids` has \[4\] \(a list\) at position 1"),
        ({"input_ids": [3.5]}, r"`input_ids` has 3.5 \(a fractional number\)"),
        ({"input_ids": [3.0]}, r"`input_ids` has 3.0 \(a fractional number\)"),
        ({"input_ids": [3, True]}, r"`input_ids` has True \(true or false\) at position 1"),
        ({"input_ids": [None]}, "`input_ids` has null at position 0"),
        ({"input_ids": ["3"]}, "`input_ids` has 3 .str. at position 0"),
        ({"input_ids": [3, -1]}, "`input_ids` has token id -1, .* 10 entries"),
        ({"input_ids": [3, 10]}, "`input_ids` has token id 10, .* 10 entries"),
        ({"input_ids": [2**31]}, "token id 2147483648,"),
        ({"input_ids": [2**63]}, "token id 9223372036854775808,"),
        ({"input_ids": [10**3000]}, "token id 1000.*…,"),
        ({"input_ids": 3}, r"`input_ids` is 3 \(a number\)"),
        ({"input_ids": {"a": 3}, "text": "x"}, "`input_ids` is .* .an object."),
        ({"input_ids": None}, "`input_ids` is null"),
        ({"text": None}, "`text` is null"),
        ({"text": ["x"]}, r"`text` is \['x'\] \(a list\)"),
        ({"text": False}, "`text` is False"),
        ({"text": "ab\ud83d"}, r"`text` has half of a character, U\+D83D, at position 2"),
        ({"body": "x", "id": 1}, "its fields are `body`, `id`"),
        ({"messages": [{"role": "user", "content": "x"}]}, "its fields are `messages`"),
        ({}, "its fields are none"),
        ({str(i): i for i in range(1000)}, "its fields are `0`, `1`.{1,200}…"),
    ],
)
def test_an_unusable_row_is_refused_with_its_file_and_line(
    tmp_path: Path, row: dict[str, Any], found: str
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": [1]}, row, {"text": "x"}])
    with pytest.raises(MolError, match=f"rows.jsonl`, line 2: .*{found}") as caught:
        list(read_documents(data, vocab_size=10))
    assert caught.value.allowed


def test_huge_integers_of_any_length_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input_ids": [' + "9" * 100_000 + "]}\n")
    with pytest.raises(MolError, match="line 1 is not JSON"):
        list(read_documents(str(path)))


@pytest.mark.parametrize(
    "name",
    ["a[1].txt", "what?.txt", "all*.txt", "a@v2.txt", "a b,c.txt", "s3:x.txt", "é::0.3.txt",
     os.fsdecode(b"\xff.txt")],
)  # fmt: skip
def test_a_path_is_no_pattern(tmp_path: Path, name: str) -> None:
    for other in ("a1.txt", "what1.txt", "what2.txt", "all.txt"):
        (tmp_path / other).write_text("another file")
    with pytest.raises(MolError, match="does not exist"):
        read_documents(str(tmp_path / name))
    (tmp_path / name).write_text("this file")
    assert list(read_documents(str(tmp_path / name))) == ["this file"]


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        ("hf://org/name", ("org/name", None, "train")),
        ("hf://org/name:20220301.en", ("org/name", "20220301.en", "train")),
        ("hf://org/name::validation", ("org/name", None, "validation")),
        ("hf://name:a:b", ("name", "a", "b")),
    ],
)
def test_a_hub_data_set_is_streamed(
    monkeypatch: pytest.MonkeyPatch, data: str, arguments: tuple[str, str | None, str]
) -> None:
    def load(path: str, name: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        assert (path, name, split) == arguments and streaming
        return [{"text": "one "}, {"text": "two"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert list(read_documents(data)) == ["one", "two"]


def test_errors_of_the_hub_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(**arguments: Any) -> None:
        raise FileNotFoundError("no such data set\nand more")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(MolError, match=r"cannot be read: no such data set\n") as caught:
        list(read_documents("hf://org/name"))
    assert "network" in caught.value.hint
    with pytest.raises(MolError, match="not the name of a data set"):
        read_documents("hf://org/name/file.txt")
    with pytest.raises(MolError) as caught:
        read_documents("org/name")
    assert caught.value.hint.startswith("hf://org/name for")
