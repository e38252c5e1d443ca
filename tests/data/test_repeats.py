"""Rows that repeat themselves, made from the rows of a corpus."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from molcli.data.mixture import Corpus, load_rows
from molcli.data.packing import TokenRows, pack
from molcli.data.repeats import (
    ListTokens,
    RepeatedRows,
    list_tokens,
    pairs_row,
    passages_row,
    with_repeats,
)

OTHER = 100_000  # tokens of the text between copies; below it are those of the copies


def numbered(length: int, documents: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text and text between, in which no token comes twice, and document ids of the text."""
    text = np.arange(length, dtype=np.int32)
    return text, text * documents // length, text + OTHER


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def copies(row: np.ndarray) -> list[tuple[int, int, int]]:
    """(Start, size, distance to the copy) of each passage in a row of `numbered` text."""
    found, at, said = [], 0, set[int]()
    while at < len(row):
        if row[at] >= OTHER or row[at] in said:
            at += 1
            continue
        end = at + 1
        while end < len(row) and row[end] == row[end - 1] + 1 and row[end] < OTHER:
            end += 1
        again = at + 1 + np.flatnonzero(row[at + 1 :] == row[at]).item()
        assert np.array_equal(row[at:end], row[again : again + end - at])
        said |= set(row[at:end].tolist())
        found.append((at, end - at, again - end))
        at = end
    return found


@pytest.mark.parametrize("length", [48, 100, 512, 4096])
def test_passages_come_back_after_other_text(length: int) -> None:
    sizes, distances, counts = set(), set(), set()
    for seed in range(60):
        row = passages_row(*numbered(length), generator(seed))
        assert row.shape == (length,) and row.dtype == np.int32
        found = copies(row)
        counts.add(len(found))
        for start, size, distance in found:
            assert min(16, length // 4) <= size <= min(128, length // 4)
            assert min(64, length // 2) <= distance <= 1024
            between = row[start + size : start + size + distance]
            assert (between >= OTHER).all()
            sizes.add(size)
            distances.add(distance)
        said = sum(2 * size for _, size, _ in found)
        assert (row >= OTHER).sum() == length - said  # all else is other text, each token once
        assert len(set(row.tolist())) == length - said // 2
    assert min(counts) >= 1
    if length == 4096:
        assert min(distances) < 80 and max(distances) > 900 and max(counts) > 3
        assert np.median(list(distances)) < 450  # of log-uniform ones; of uniform ones it is 544
        assert min(sizes) < 20 and max(sizes) > 124


def test_a_passage_is_of_one_document_where_that_is_long_enough() -> None:
    for seed in range(40):
        text, documents, other = numbered(512, documents=12)  # 42 or 43 tokens each
        for start, size, _ in copies(row := passages_row(text, documents, other, generator(seed))):
            assert len(set(documents[row[start : start + size]])) == 1
        text, documents, other = numbered(512, documents=100)  # 5 tokens: none is long enough
        assert copies(passages_row(text, documents, other, generator(seed)))


@pytest.mark.parametrize("length", [48, 100, 512, 4096])
def test_pairs_come_back_in_another_order(length: int) -> None:
    separator = 7
    lengths, counts = set(), set()
    for seed in range(60):
        text, _, other = numbered(length)
        row = pairs_row(text, other, generator(seed), ListTokens(separator, avoided=(11, 30)))
        assert row is not None and row.shape == (length,) and row.dtype == np.int32
        said = row[row < OTHER].tolist()
        assert not {11, 30} & set(said)
        lists = "".join(f" {token}" for token in said).removesuffix(f" {separator}")
        pairs = [tuple(map(int, pair.split())) for pair in re.split(rf" {separator}(?!\d)", lists)]
        # A list, the same pairs in another order, the next list.
        while pairs:
            count = next(n for n in range(1, len(pairs)) if pairs[n] in pairs[:n])
            first, second = pairs[:count], pairs[count : 2 * count]
            count = len(set(first))
            assert sorted(first) == sorted(second) and len(set(first)) == len(first)
            assert first != second or len(first) == 1
            counts.add(count)
            lengths |= set(map(len, first))
            pairs = pairs[2 * len(first) :]
    # A key of 1 to 3, a link of up to 2, a value of 1 to 4.
    assert min(lengths) == 2 and max(lengths) == 9
    assert min(counts) >= min(4, length // 20)


def test_what_stands_between_key_and_value_is_the_same_in_a_row_and_differs_between_rows() -> None:
    links = set()
    for seed in range(40):
        text, _, other = numbered(512)
        row = pairs_row(text, other, generator(seed), ListTokens(7))
        assert row is not None
        said = " ".join(map(str, row[row < OTHER].tolist()))
        pairs = {tuple(pair.split()) for pair in re.split(r" ?\b7\b ?", said) if pair}
        common = set.intersection(*map(set, pairs))
        assert len(common) <= 2
        links.add(tuple(sorted(common)))
    assert len(links) > 10 and () in links


def test_text_without_different_keys_has_no_pairs() -> None:
    same = np.full(64, 5, dtype=np.int32)
    assert pairs_row(same, same, generator(0), ListTokens()) is None
    text, _, other = numbered(64)
    avoided = tuple(range(64))
    assert pairs_row(text, other, generator(0), ListTokens(3, avoided)) is None


def test_without_a_tokenizer_a_rare_token_of_the_text_is_the_separator() -> None:
    text = np.arange(512, dtype=np.int32) % 50
    text[100] = 99
    row = pairs_row(text, text + OTHER, generator(0), list_tokens(None, 512))
    assert row is not None
    assert (row == 99).sum() >= 8


WORDS = [f"{a}{b}{a}" for a in "bcdfghklmnprst" for b in ("a", "e", "i", "o", "u", "ou")]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Its tokens are words with a space in front, a colon, a newline and a full stop."""
    tokens = ["<unk>", "</s>", ":", ".", "Ċ", *(f"Ġ{word}" for word in WORDS)]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def test_lists_never_have_the_form_of_the_recall_test(tmp_path: Path) -> None:
    """Though half of the text consists of its lines, no key and no value has a colon."""
    tokenizer = word_tokenizer()
    draw = random.Random(0)
    path = tmp_path / "text.jsonl"
    with path.open("w") as file:
        for _ in range(80):
            lines = [f" {draw.choice(WORDS)}: {draw.choice(WORDS)}\n" for _ in range(40)]
            plain = [f" {draw.choice(WORDS)}" for _ in range(160)]
            file.write(json.dumps({"text": "".join(lines) + "".join(plain) + "."}) + "\n")
    assert (line := re.compile(r"[a-z]+: [a-z]+\n")).search("".join(lines))
    corpus = load_rows(str(path), tokenizer, vocab_size=300, length=512, seed=0)
    tokens = list_tokens(tokenizer, 300)
    assert (tokens.separator, tokens.avoided) == (4, (0, 1, 2, 4))
    assert list_tokens(tokenizer, 4).separator is None  # not a token of the model
    for number in range(40):
        text = corpus.select(slice(number, number + 1)).input_ids[0].numpy()
        row = pairs_row(text, np.full_like(text, OTHER), generator(number), tokens)
        assert row is not None
        said = row[row != OTHER].tolist()
        assert 2 not in said and 4 in said
        assert not line.search(tokenizer.decode(said))


def kinds(rows: TokenRows) -> list[bool]:
    return [bool(documents.any()) for documents in rows.document_ids]


def plain_corpus(tmp_path: Path, folder_of: Callable[..., Path], length: int = 64) -> Corpus:
    """A mixture of a file and a folder of tokens, each with ids of its own."""
    path = tmp_path / "a.jsonl"
    ids = torch.randint(3, 50, (40, 37), generator=generator(0)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    documents = list(torch.randint(60, 99, (30, 41), generator=generator(1), dtype=torch.int32))
    folder = folder_of(documents, tmp_path / "tokens", shard_tokens=300)
    weights = {str(path): 3.0, str(folder): 1.0}
    return load_rows(weights, None, vocab_size=100, length=length, seed=0)


def test_the_share_of_rows_is_the_setting_and_the_others_stay_as_they_were(
    tmp_path: Path, folder_of: Callable[..., Path]
) -> None:
    plain = plain_corpus(tmp_path, folder_of)
    mixed = plain.with_repeats(0.25, count=50, seed=0, tokens=ListTokens())
    index = mixed.order(3).indices(0, 200)
    own = index < 50  # the rows of the first source
    assert next(iter(mixed.sources)) == "repeats" and int(own.sum()) == 50
    assert all(3 <= int(part.sum()) <= 5 for part in own.split(16)[:-1])  # 4 of each batch of 16
    assert index[own].unique().numel() == 50  # none comes twice
    rows, before = mixed.select(index[~own]), plain.select(plain.order(3).indices(0, 150))
    for field in ("input_ids", "document_ids", "lengths"):
        assert torch.equal(getattr(rows, field), getattr(before, field))
    repeats = mixed.select(index[own])
    assert not repeats.document_ids.any() and repeats.tokens == 50 * 64
    assert all(kinds(before))
    # 3:1 by weight, in half of the tokens of each row, and the same in the other half.
    of_folder = float((repeats.input_ids >= 60).float().mean())
    assert 0.15 < of_folder < 0.35
    assert mixed.epochs(200)["repeats"] is None
    assert {name: n for name, n in mixed.epochs(200).items() if name != "repeats"} == plain.epochs(
        150
    )


def test_no_repeats_are_the_corpus_itself(tmp_path: Path, folder_of: Callable[..., Path]) -> None:
    plain = plain_corpus(tmp_path, folder_of)
    same = plain.with_repeats(0.0, count=0, seed=0, tokens=ListTokens())
    assert same is plain


def test_a_row_depends_on_data_seed_and_number_alone(
    tmp_path: Path, folder_of: Callable[..., Path]
) -> None:
    plain = plain_corpus(tmp_path, folder_of)

    def rows(seed: int, corpus: Corpus = plain) -> RepeatedRows:
        found = corpus.with_repeats(0.5, count=40, seed=seed, tokens=ListTokens()).sources[
            "repeats"
        ]
        assert isinstance(found, RepeatedRows)
        return found

    every = rows(0).select(slice(None)).input_ids
    assert len(every) == len(rows(0)) == 40
    backwards = torch.arange(39, -1, -1)
    assert torch.equal(rows(0).select(backwards).input_ids.flip(0), every)
    assert torch.equal(rows(0).select(torch.tensor([17])).input_ids[0], every[17])
    assert len(every.unique(dim=0)) == 40
    assert not torch.equal(rows(1).select(slice(None)).input_ids, every)
    prints = {rows(seed).fingerprint() for seed in (0, 1)}
    prints |= {replace(rows(0), count=41).fingerprint()}
    prints |= {replace(rows(0), list_tokens=ListTokens(5)).fingerprint()}
    assert len(prints) == 4 and rows(0).fingerprint() in prints


def test_a_source_called_repeats_keeps_its_name(tmp_path: Path) -> None:
    rows = pack([torch.arange(100, dtype=torch.int32)], 50, seed=None)
    corpus = Corpus({"repeats": rows}, {"repeats": 1.0})
    mixed = corpus.with_repeats(0.5, count=2, seed=0, tokens=ListTokens())
    assert mixed.sources["repeats"] is rows and len(mixed.sources) == 2


def test_a_share_of_rows_in_memory_is_replaced(tmp_path: Path) -> None:
    documents = [torch.arange(100 * i, 100 * i + 20, dtype=torch.int32) for i in range(64)]
    rows = pack(documents, 64, seed=None)
    found = with_repeats(rows, 0.25, seed=3, tokens=ListTokens())
    assert kinds(rows) == [True] * 20 and kinds(found).count(False) == 5
    kept = [i for i, plain in enumerate(kinds(found)) if plain]
    assert torch.equal(found.input_ids[kept], rows.input_ids[kept])
    assert torch.isin(found.input_ids, rows.input_ids).all()
    assert found.tokens == rows.tokens
    again = with_repeats(rows, 0.25, seed=3, tokens=ListTokens())
    assert torch.equal(again.input_ids, found.input_ids)
    assert with_repeats(rows, 0.0, seed=3, tokens=ListTokens()) is rows
    short = pack(documents, 47, seed=None)
    assert with_repeats(short, 0.25, seed=3, tokens=ListTokens()) is short
