"""Tokenizing documents."""

from typing import Any

import pytest
import torch

from molcli.data.tokenizer import tokenize
from molcli.errors import MolError


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
