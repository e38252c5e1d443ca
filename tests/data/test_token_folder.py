"""Tokens on disk give the same rows as text, and refuse what does not fit them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from molcli.data.documents import read_documents
from molcli.data.mixture import load_documents, load_rows
from molcli.data.packing import pack
from molcli.data.token_folder import INDEX, load_folder_rows, write_token_folder
from molcli.data.tokenizer import open_tokenizer, tokenize, tokenizer_fingerprint
from molcli.errors import MolError

Tokenizers = Callable[..., PreTrainedTokenizerFast]
MakeFolder = Callable[..., Path]


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    length=st.integers(1, 7),
    seed=st.none() | st.integers(0, 5),
    limit=st.none() | st.integers(1, 40),
    pad_last=st.booleans(),
    shard_tokens=st.integers(1, 30),
)
def test_a_folder_gives_the_same_rows_as_packing_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    folder_of: MakeFolder,
    sizes: list[int],
    length: int,
    seed: int | None,
    limit: int | None,
    pad_last: bool,
    shard_tokens: int,
) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    texts = [torch.randint(100, (size,), generator=generator).tolist() for size in sizes]
    documents = list(tokenize(texts, None, vocab_size=100))
    folder = folder_of(documents, tmp_path_factory.mktemp("d") / "tokens", shard_tokens)
    cut = list(tokenize(texts, None, vocab_size=100, limit=limit))
    how = dict(length=length, seed=seed, pad_last=pad_last)
    try:
        expected = pack(cut, **how)  # type: ignore[arg-type]
    except MolError as error:
        with pytest.raises(MolError, match=error.found.removeprefix("the data ")):
            load_folder_rows(folder, None, vocab_size=100, limit=limit, **how)  # type: ignore[arg-type]
        return
    found = load_folder_rows(folder, None, vocab_size=100, limit=limit, **how)  # type: ignore[arg-type]
    assert (len(found), found.tokens) == (len(expected), expected.tokens)
    assert found.select(slice(None)).fingerprint() == expected.fingerprint()
    backwards = torch.arange(len(found)).flip(0)
    assert found.select(backwards).fingerprint() == expected.select(backwards).fingerprint()


def test_text_through_a_folder_is_the_same_as_text(
    tmp_path: Path, tiny_tokenizer: Tokenizers
) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("the quick brown fox\n\na lazy dog\n\nthe slow brown bear sleeps\n")
    tokenizer = tiny_tokenizer()
    folder = tmp_path / "tokens"
    ids = tokenize(read_documents(str(text)), tokenizer, vocab_size=len(tokenizer))
    total = write_token_folder(ids, folder, tokenizer, source=str(text))
    how = dict(vocab_size=128, length=8, seed=3)
    rows = [load_rows(str(data), tokenizer, **how).without_repeats() for data in (text, folder)]  # type: ignore[arg-type]
    assert rows[0].fingerprint() == rows[1].fingerprint()
    about = json.loads((folder / INDEX).read_text())
    assert (about["tokens"], about["documents"]) == (total, 3)
    for limit in (None, 1, 6, total):
        one, two = (
            list(load_documents(str(data), tokenizer, vocab_size=128, limit=limit))
            for data in (text, folder)
        )
        assert [document.tolist() for document in one] == [d.tolist() for d in two]
        assert sum(map(len, two)) == (limit or total)


def test_the_fingerprint_of_a_folder_depends_on_content_and_packing(
    tmp_path: Path, folder_of: MakeFolder
) -> None:
    documents = [torch.arange(i, i + 6, dtype=torch.int32) for i in range(5)]
    folders = [folder_of(documents[:n], tmp_path / str(n)) for n in (4, 5)]
    again = folder_of(documents[:4], tmp_path / "again")

    def of(folder: Path, length: int = 4, seed: int = 0) -> str:
        return load_rows(str(folder), None, vocab_size=99, length=length, seed=seed).fingerprint()

    assert of(folders[0]) == of(again)
    assert len({of(folders[0]), of(folders[1]), of(again, length=5), of(again, seed=1)}) == 4


class Other:
    """The tiny tokenizer with one thing changed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos: int) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, eos

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer(text)["input_ids"]}

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()


def test_another_tokenizer_is_refused_but_a_saved_copy_is_not(
    tmp_path: Path, tiny_tokenizer: Tokenizers, folder_of: MakeFolder
) -> None:
    folder = folder_of([torch.arange(20, dtype=torch.int32)], tmp_path / "tokens")
    tiny_tokenizer().save_pretrained(tmp_path / "copy")
    copy = open_tokenizer(tmp_path / "copy")
    assert len(load_rows(str(folder), copy, vocab_size=128, length=4)) == 5
    for other in (tiny_tokenizer(60), Other(tiny_tokenizer(), eos=1)):
        assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tiny_tokenizer())  # type: ignore[arg-type]
        with pytest.raises(MolError, match="another tokenizer"):
            load_rows(str(folder), other, vocab_size=128, length=4)  # type: ignore[arg-type]
    with pytest.raises(MolError, match=r"token id 19, .* 19 entries"):
        load_rows(str(folder), None, vocab_size=19, length=4)


def test_other_and_damaged_folders_are_refused(tmp_path: Path, folder_of: MakeFolder) -> None:
    folder = folder_of([torch.arange(20, dtype=torch.int32)], tmp_path / "tokens")
    (tmp_path / "empty").mkdir()
    shard = folder / "tokens-00000.npy"
    for path in (tmp_path / "empty", folder):
        if path == folder:
            shard.write_bytes(shard.read_bytes()[:-6])
        with pytest.raises(MolError, match="not tokenised data, or damaged"):
            load_rows(str(path), None, vocab_size=128, length=4)


def test_shards_are_as_narrow_as_their_ids_allow(tmp_path: Path, folder_of: MakeFolder) -> None:
    documents = [torch.tensor([2**16 + i, 3, 4], dtype=torch.int32) for i in (-1, 0)]
    folder = folder_of(documents, tmp_path / "t", 3)
    shards = [np.load(folder / f"tokens-0000{i}.npy") for i in (0, 1)]
    assert [shard.dtype for shard in shards] == [np.uint16, np.int32]
    rows = load_rows(str(folder), None, vocab_size=2**17, length=6).without_repeats()
    assert rows.input_ids.tolist() == [[2**16 - 1, 3, 4, 2**16, 3, 4]]
