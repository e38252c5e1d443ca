"""Reading documents."""

import json
import lzma
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


def test_jsonl_needs_no_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    rows = [{"text": "één", "n": 1}, {"n": ["of", "another", "type"], "input_ids": [5]}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert list(read_documents(data)) == ["één", [5]]
    with pytest.raises(MolError, match="needs the library `datasets`"):
        list(read_documents(write_jsonl(tmp_path / "rows.jsonl.xz", rows)))


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
        ("number.jsonl", '{"text": 3}\n', "its fields are `text`"),
        ("broken.jsonl", '{"text": "x"}\n\n{"text": "x"\n', "cannot be read: line 3 is not JSON"),
        ("list.jsonl", '["x"]\n', "cannot be read: line 1 is not a JSON object"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', "cannot be read: 'utf-8' codec"),
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
        return [{"text": " one "}, {"text": "two"}]

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
