"""Several sources of `--data`, mixed by weight."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from molcli.data.mixture import load_rows
from molcli.errors import MolError

Write = Callable[..., str]
MakeFolder = Callable[..., Path]


@pytest.fixture
def numbered(tmp_path: Path) -> Write:
    """Write documents of one id each, so that a token identifies its source."""

    def write(name: str, token: int, documents: int = 12, size: int = 5) -> str:
        rows = [{"input_ids": [token] * size} for _ in range(documents)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def test_a_mixture_has_its_weights_in_tokens(
    tmp_path: Path, numbered: Write, folder_of: MakeFolder
) -> None:
    """Also where the sources' documents have other lengths, and one is a folder."""
    short, long = numbered("a.jsonl", 7), numbered("b.jsonl", 9, documents=2, size=30)
    folder = folder_of([torch.full((11,), 8, dtype=torch.int32)] * 4, tmp_path / "tokens")
    weights = {short: 5.0, str(folder): 3.0, long: 2.0}
    rows = load_rows(weights, None, vocab_size=10, length=4, seed=0)
    assert rows.tokens == 60 + 44 + 60
    drawn = rows.batch(rows.order(seed=0).indices(0, 100)).input_ids
    assert [int((drawn == token).sum()) for token in (7, 8, 9)] == [200, 120, 80]
    assert rows.epochs(100) == {short: 3.333, str(folder): 2.727, long: 1.333}
    every = torch.cat([batch.input_ids for batch in rows.batches(7)])
    assert torch.equal(every, rows.select(torch.arange(len(rows))).input_ids)


def test_a_missing_source_is_refused_before_another_is_read(
    tmp_path: Path, numbered: Write
) -> None:
    def progress(done: int, total: int | None, note: str = "") -> None:
        raise AssertionError("something was read")

    weights = {numbered("a.jsonl", 7): 1.0, str(tmp_path / "gone.jsonl"): 1.0}
    with pytest.raises(MolError, match=r"gone.jsonl` does not exist"):
        load_rows(weights, None, vocab_size=10, length=4, progress=progress)


def test_a_limit_is_divided_by_weight(numbered: Write) -> None:
    weights = {numbered("a.jsonl", 7): 3.0, numbered("b.jsonl", 9): 1.0}
    rows = load_rows(weights, None, vocab_size=10, length=4, limit=32)
    assert [len(part) for part in rows.sources.values()] == [6, 2]
    # How much of the files that is, is unknown: the rest was not read.
    assert rows.epochs(8) == dict.fromkeys(weights, None)


def test_a_pass_is_one_over_the_whole_source(
    tmp_path: Path, numbered: Write, folder_of: MakeFolder
) -> None:
    folder = str(folder_of([torch.full((10,), 8, dtype=torch.int32)] * 20, tmp_path / "tokens"))
    part = load_rows(folder, None, vocab_size=10, length=4, limit=20)
    assert part.epochs(5) == {folder: 0.1}  # 20 of 200 tokens
    assert load_rows(folder, None, vocab_size=10, length=4).epochs(5) == {folder: 0.1}
    path = numbered("a.jsonl", 7)  # 60 tokens
    assert load_rows(path, None, vocab_size=10, length=4, limit=20).epochs(5) == {path: None}
    assert load_rows(path, None, vocab_size=10, length=4, limit=90).epochs(15) == {path: 1.0}


def test_without_repeats_stops_before_a_source_repeats(numbered: Write) -> None:
    weights = {numbered("a.jsonl", 7, documents=4): 1.0, numbered("b.jsonl", 9): 1.0}
    rows = load_rows(weights, None, vocab_size=10, length=5).without_repeats()
    assert rows.input_ids[:, 0].sort().values.tolist() == [7] * 4 + [9] * 4


def test_the_fingerprint_of_a_mixture_depends_on_its_weights_but_not_its_names(
    tmp_path: Path, numbered: Write
) -> None:
    a, b = numbered("a.jsonl", 7), numbered("b.jsonl", 9)
    moved = str(Path(b).rename(tmp_path / "c.jsonl"))
    b = numbered("b.jsonl", 9)

    def of(weights: dict[str, float]) -> str:
        return load_rows(weights, None, vocab_size=10, length=5).fingerprint()

    assert of({a: 1.0, b: 2.0}) == of({a: 1.0, moved: 2.0}) != of({a: 1.0, b: 1.0})
    assert of({a: 1.0}) == load_rows(a, None, vocab_size=10, length=5).fingerprint()
