"""What `--data` names, as rows: files, tokenised folders, and mixtures of them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from molcli.data.documents import read_documents, tokenize
from molcli.data.mixture import load_documents, load_rows
from molcli.data.packing import pack
from molcli.data.token_folder import INDEX, load_folder_rows, write_token_folder
from molcli.data.tokenizer import open_tokenizer, tokenizer_fingerprint
from molcli.errors import MolError

Write = Callable[..., str]
Tokenizers = Callable[..., PreTrainedTokenizerFast]
MakeFolder = Callable[..., Path]


@pytest.fixture
def numbered(tmp_path: Path) -> Write:
    """Writes documents of one id each, so that a token tells its source."""

    def write(name: str, token: int, documents: int = 12, size: int = 5) -> str:
        rows = [{"input_ids": [token] * size} for _ in range(documents)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="session")
def folder_of(tiny_tokenizer: Tokenizers) -> MakeFolder:
    """Writes documents as a folder of shards."""

    def write(documents: list[torch.Tensor], out: Path, shard_tokens: int = 9) -> Path:
        write_token_folder(documents, out, tiny_tokenizer(), source="x", shard_tokens=shard_tokens)
        return out

    return write


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    length=st.integers(1, 7),
    seed=st.none() | st.integers(0, 5),
    limit=st.none() | st.integers(1, 40),
    keep_short=st.booleans(),
    shard_tokens=st.integers(1, 30),
)
def test_a_folder_gives_the_rows_that_packing_in_memory_gives(
    tmp_path_factory: pytest.TempPathFactory,
    folder_of: MakeFolder,
    sizes: list[int],
    length: int,
    seed: int | None,
    limit: int | None,
    keep_short: bool,
    shard_tokens: int,
) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    texts = [torch.randint(100, (size,), generator=generator).tolist() for size in sizes]
    documents = list(tokenize(texts, None, vocab_size=100))
    folder = folder_of(documents, tmp_path_factory.mktemp("d") / "tokens", shard_tokens)
    cut = list(tokenize(texts, None, vocab_size=100, limit=limit))
    how = dict(length=length, seed=seed, keep_short=keep_short)
    try:
        expected = pack(cut, **how)  # type: ignore[arg-type]
    except MolError as error:
        with pytest.raises(MolError, match=error.found.removeprefix("the data ")):
            load_folder_rows(folder, None, vocab_size=100, limit=limit, **how)  # type: ignore[arg-type]
        return
    found = load_folder_rows(folder, None, vocab_size=100, limit=limit, **how)  # type: ignore[arg-type]
    assert (len(found), found.tokens) == (len(expected), expected.tokens)
    assert found.rows(slice(None)).fingerprint() == expected.fingerprint()
    backwards = torch.arange(len(found)).flip(0)
    assert found.rows(backwards).fingerprint() == expected.rows(backwards).fingerprint()


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
    rows = [load_rows(str(data), tokenizer, **how).once() for data in (text, folder)]  # type: ignore[arg-type]
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


def test_the_fingerprint_of_a_folder_tells_content_and_packing_apart(
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


def test_another_tokenizer_is_refused_a_saved_copy_is_not(
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


def test_a_folder_that_is_none_or_damaged_is_refused(tmp_path: Path, folder_of: MakeFolder) -> None:
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
    rows = load_rows(str(folder), None, vocab_size=2**17, length=6).once()
    assert rows.input_ids.tolist() == [[2**16 - 1, 3, 4, 2**16, 3, 4]]


def test_a_mixture_has_its_weights_in_tokens(
    tmp_path: Path, numbered: Write, folder_of: MakeFolder
) -> None:
    """Also where the sources' documents have other lengths, and one is a folder."""
    short, long = numbered("a.jsonl", 7), numbered("b.jsonl", 9, documents=2, size=30)
    folder = folder_of([torch.full((11,), 8, dtype=torch.int32)] * 4, tmp_path / "tokens")
    weights = {short: 5.0, str(folder): 3.0, long: 2.0}
    rows = load_rows(weights, None, vocab_size=10, length=4, seed=0)
    assert rows.tokens == 60 + 44 + 60
    taken = rows.batch(rows.order(seed=0).take(0, 100)).input_ids
    assert [int((taken == token).sum()) for token in (7, 8, 9)] == [200, 120, 80]
    assert rows.passes(100) == {short: 3.333, str(folder): 2.727, long: 1.333}
    every = torch.cat([batch.input_ids for batch in rows.batches(7)])
    assert torch.equal(every, rows.rows(torch.arange(len(rows))).input_ids)


def test_a_missing_source_is_refused_before_another_is_read(
    tmp_path: Path, numbered: Write
) -> None:
    def progress(done: int, total: int | None, note: str = "") -> None:
        raise AssertionError("something was read")

    weights = {numbered("a.jsonl", 7): 1.0, str(tmp_path / "gone.jsonl"): 1.0}
    with pytest.raises(MolError, match=r"gone.jsonl` does not exist"):
        load_rows(weights, None, vocab_size=10, length=4, progress=progress)


def test_a_limit_is_shared_by_weight(numbered: Write) -> None:
    weights = {numbered("a.jsonl", 7): 3.0, numbered("b.jsonl", 9): 1.0}
    rows = load_rows(weights, None, vocab_size=10, length=4, limit=32)
    assert [len(part) for part in rows.sources.values()] == [6, 2]
    assert rows.passes(8) == dict.fromkeys(weights, 1.0)


def test_once_ends_before_a_source_repeats(numbered: Write) -> None:
    weights = {numbered("a.jsonl", 7, documents=4): 1.0, numbered("b.jsonl", 9): 1.0}
    once = load_rows(weights, None, vocab_size=10, length=5).once()
    assert once.input_ids[:, 0].sort().values.tolist() == [7] * 4 + [9] * 4


def test_the_fingerprint_of_a_mixture_knows_its_weights_but_not_its_names(
    tmp_path: Path, numbered: Write
) -> None:
    a, b = numbered("a.jsonl", 7), numbered("b.jsonl", 9)
    moved = str(Path(b).rename(tmp_path / "c.jsonl"))
    b = numbered("b.jsonl", 9)

    def of(weights: dict[str, float]) -> str:
        return load_rows(weights, None, vocab_size=10, length=5).fingerprint()

    assert of({a: 1.0, b: 2.0}) == of({a: 1.0, moved: 2.0}) != of({a: 1.0, b: 1.0})
    assert of({a: 1.0}) == load_rows(a, None, vocab_size=10, length=5).fingerprint()
