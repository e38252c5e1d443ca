"""Tokenizing documents."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from molcli.data.tokenizer import find_tokenizer, open_tokenizer, tokenize
from molcli.errors import MolError

Tokenizers = Callable[..., PreTrainedTokenizerFast]


class Letters:
    """A tokenizer with BOS 1 and one id per letter, which adds no EOS."""

    eos_token_id: int | None = 2

    def __call__(self, texts: list[str], verbose: bool) -> dict[str, Any]:
        return {"input_ids": [[1, *(ord(c) - ord("a") + 3 for c in text)] for text in texts]}


def test_text_ends_with_eos_and_token_lists_are_unchanged() -> None:
    tokens = list(tokenize(["ab", [7, 7], "c"], Letters(), vocab_size=30))  # type: ignore[arg-type]
    assert [row.tolist() for row in tokens] == [[1, 3, 4, 2], [7, 7], [1, 5, 2]]
    assert {row.dtype for row in tokens} == {torch.int32}


def test_without_add_eos_even_the_eos_of_the_tokenizer_is_removed() -> None:
    class LettersWithEos(Letters):
        def __call__(self, texts: list[str], verbose: bool) -> dict[str, Any]:
            return {
                "input_ids": [[*row, 2] for row in super().__call__(texts, verbose)["input_ids"]]
            }

    for tokenizer in (Letters(), LettersWithEos()):
        for add_eos, end in ((False, []), (True, [2])):
            ids = list(tokenize(["ab"], tokenizer, vocab_size=30, add_eos=add_eos))  # type: ignore[arg-type]
            assert [row.tolist() for row in ids] == [[1, 3, 4, *end]]


def test_limit_cuts_the_last_document_and_progress_reaches_it() -> None:
    seen: list[tuple[int, int | None]] = []

    def progress(done: int, total: int | None, note: str = "") -> None:
        seen.append((done, total))

    documents = iter([[3, 4, 5], [6, 7], [8]])
    tokens = list(tokenize(documents, None, vocab_size=30, limit=4, progress=progress))
    assert [row.tolist() for row in tokens] == [[3, 4, 5], [6]]
    assert seen[-1] == (4, 4)


@pytest.mark.parametrize("document", [[3, 10], [3, -1]])
def test_ids_outside_the_vocabulary_are_refused(document: list[int]) -> None:
    with pytest.raises(MolError, match=f"token id {document[1]}, .* 10 entries"):
        list(tokenize([document], None, vocab_size=10))


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(MolError, match="no tokenizer"):
        list(tokenize(["text"], None, vocab_size=10))


@pytest.mark.parametrize(
    "damage",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},  # panics
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}},
        {"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]]}},
        {"model": {"type": "Unigram", "vocab": [["a", -1.0]]}},  # fails at the first unknown letter
        {"model": None},
        {"added_tokens": [{"id": -1, "content": "x"}]},
    ],
)
@pytest.mark.parametrize("open_from", [open_tokenizer, lambda folder: find_tokenizer(str(folder))])
def test_a_tokenizer_that_cannot_be_used_is_refused_when_it_is_opened(
    tmp_path: Path,
    tiny_tokenizer: Tokenizers,
    damage: dict[str, Any],
    open_from: Callable[..., Any],
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | damage))
    with pytest.raises(MolError, match=r"the tokenizer in .* cannot be read") as caught:
        open_from(tmp_path)
    assert "tokenizer.json" in caught.value.hint


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 10**5, "\ud800", "null"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_of_a_tokenizer_that_are_not_json_are_refused(
    tmp_path: Path, tiny_tokenizer: Tokenizers, name: str, content: str
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(MolError, match="cannot be read"):
        open_tokenizer(tmp_path)


def test_code_of_a_tokenizer_is_never_run(
    tmp_path: Path, tiny_tokenizer: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the user asked whether it should."""
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    code = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    with contextlib.suppress(MolError):  # transformers may take the tokenizer without its class
        open_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_token_beyond_the_vocabulary_is_named(tiny_tokenizer: Tokenizers) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    size = len(tokenizer) - 1
    assert list(tokenize(["the quick"], tokenizer, vocab_size=size))
    with pytest.raises(MolError, match=f"the token '<extra>' the id {size}, .* {size} entries"):
        list(tokenize(["the <extra>"], tokenizer, vocab_size=size))


def test_errors_of_a_tokenizer_on_the_data_are_reported() -> None:
    class Panic(BaseException):
        pass

    Panic.__name__ = "PanicException"

    def raising(error: BaseException) -> Any:
        class Failing(Letters):
            def __call__(self, texts: list[str], verbose: bool) -> dict[str, Any]:
                raise error

        return Failing()

    for error in (Panic("index out of bounds"), Exception("no id")):
        with pytest.raises(MolError, match=r"the tokenizer fails on the data .(index|no id)"):
            list(tokenize(["ab"], raising(error), vocab_size=30))
    with pytest.raises(KeyboardInterrupt):
        list(tokenize(["ab"], raising(KeyboardInterrupt()), vocab_size=30))
