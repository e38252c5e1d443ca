"""Packing documents into rows."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molcli.data.mixture import load_rows
from molcli.data.packing import IGNORED, pack
from molcli.errors import MolError


def documents(*sizes: int) -> list[torch.Tensor]:
    """Documents whose tokens count up across all of them, so that each token is recognisable."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        torch.arange(start, start + size, dtype=torch.int32)
        for start, size in zip(starts, sizes, strict=True)
    ]


def test_positions_labels_and_documents_restart() -> None:
    batch = pack(documents(3, 4, 2), 4, seed=None).batch(slice(None))
    assert batch.input_ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert batch.labels.tolist() == [[IGNORED, 1, 2, IGNORED], [IGNORED, 5, 6, IGNORED]]
    assert batch.attention_mask is None


def test_short_last_row_is_padded_when_kept() -> None:
    rows = pack(documents(3, 3), 4, seed=None, pad_last=True)
    batch = rows.batch(slice(None))
    assert (rows.tokens, rows.num_targets) == (6, 3)
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 1, 2, IGNORED], [IGNORED, 5, IGNORED, IGNORED]]


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    length=st.integers(1, 7),
    seed=st.none() | st.integers(0, 5),
)
def test_every_token_is_kept_and_documents_stay_whole(
    sizes: list[int], length: int, seed: int | None
) -> None:
    if sum(sizes) == 0:
        sizes.append(1)
    given_documents = documents(*sizes)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rows = pack(given_documents, length, seed=seed, pad_last=True)
    seen = []
    for ids, ordinals, size in zip(rows.input_ids, rows.document_ids, rows.lengths, strict=True):
        tokens = ids[: int(size)].long()
        seen.append(tokens)
        same_document = owner[tokens][1:] == owner[tokens][:-1]
        assert torch.equal(torch.diff(ordinals[: int(size)]) == 0, same_document)
        assert (tokens[1:][same_document] == tokens[:-1][same_document] + 1).all()
        assert (torch.diff(ordinals) >= 0).all() and ordinals[0] == 0
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(sum(sizes)))


def test_seed_decides_the_order() -> None:
    sizes = [3] * 20
    prints = [pack(documents(*sizes), 4, seed=seed).fingerprint() for seed in (0, 0, 1, None)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_less_than_a_row_is_refused_unless_padded() -> None:
    with pytest.raises(MolError, match="3 tokens, which is less than one row of 4"):
        pack(documents(3), 4, seed=None)
    assert len(pack(documents(3), 4, seed=None, pad_last=True)) == 1


def test_load_rows_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [i, i, i]}) + "\n" for i in range(8)))
    rows = load_rows(str(path), None, vocab_size=8, length=3, limit=12)
    assert rows.without_repeats().input_ids.tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]]
