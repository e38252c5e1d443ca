"""Every bit that flips in tokens or logits on disk is noticed."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from molcli.data.logits import cache_folder, open_logits, write_logits
from molcli.data.mixture import load_documents, load_rows
from molcli.errors import MolError

MakeFolder = Callable[..., Path]
VOCAB, LENGTH, K, ROWS = 50, 8, 3, 10
INDEX: dict[str, Any] = {
    "format": 1,
    "parent": "p",
    "tokenizer": None,
    "vocab_size": VOCAB,
    "top_k": K,
    "context_length": LENGTH,
    "data": "d",
    "sources": {"a": 6, "b": 4},
    "weights": {"a": 1.0, "b": 0.5},
    "rows": ROWS,
    "rows_per_shard": 4,
}


def predictions(first: int, last: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(first)
    rows = last - first
    logits = torch.randn(rows, LENGTH, VOCAB, generator=generator).log_softmax(-1)
    log_probs, ids = logits.topk(K)
    documents = torch.arange(LENGTH, dtype=torch.int32) // 3
    return {
        "input_ids": torch.randint(VOCAB, (rows, LENGTH), generator=generator, dtype=torch.int32),
        "document_ids": documents.expand(rows, -1).contiguous(),
        "lengths": torch.full((rows,), LENGTH),
        "ids": ids.int(),
        "log_probs": log_probs.half(),
        "rest": (1 - log_probs.exp().sum(-1)).log(),
    }


def write_cache(out: Path, predict: Any = predictions, **index: Any) -> Path:
    with cache_folder(out, resume=False):
        write_logits(out, INDEX | index, predict)
    return out


def read_cache(folder: Path) -> tuple[torch.Tensor, ...]:
    cache = open_logits(folder, None, vocab_size=VOCAB, length=LENGTH)
    rows = cache.corpus().select(slice(None))
    index = torch.arange(len(rows))
    return (rows.input_ids, rows.document_ids, rows.lengths, *cache.predictions(index))


def read_tokens(folder: Path) -> list[list[int]]:
    rows = load_rows(str(folder), None, vocab_size=VOCAB, length=4, seed=1, pad_last=True)
    rows.select(slice(None))
    documents = load_documents(str(folder), None, vocab_size=VOCAB, limit=None)
    return [document.tolist() for document in documents]


def refusal(read: Callable[[Path], Any], folder: Path) -> tuple[str, str]:
    """What the reader refuses, and what it reads."""
    try:
        return "", str(read(folder))
    except MolError as error:
        return error.found, ""


@pytest.fixture
def tokens(tmp_path: Path, folder_of: MakeFolder) -> Path:
    documents = [torch.arange(i, i + 3 + i % 4, dtype=torch.int32) for i in range(7)]
    return folder_of(documents, tmp_path / "tokens")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "cache")


def test_what_was_written_is_read(tokens: Path, cache: Path) -> None:
    assert read_tokens(tokens)[1] == [1, 2, 3, 4]
    parts = [predictions(first, min(first + 4, ROWS)) for first in (0, 4, 8)]
    for name, found in zip(parts[0], read_cache(cache), strict=True):
        assert torch.equal(found, torch.cat([part[name] for part in parts]).to(found.dtype))


@pytest.mark.parametrize("kind", ["tokens", "cache"])
def test_a_flipped_bit_anywhere_is_refused(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    """It may also leave what is read unchanged: as in padding of a header."""
    folder: Path = request.getfixturevalue(kind)
    read: Callable[[Path], Any] = {"tokens": read_tokens, "cache": read_cache}[kind]
    whole = str(read(folder))
    chance = random.Random(0)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        unnoticed = 0
        for number in range(150):
            copy = tmp_path / f"{file.name}-{number}"
            shutil.copytree(folder, copy)
            flipped = bytearray(content)
            flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            (copy / file.name).write_bytes(flipped)
            refused, found = refusal(read, copy)
            assert "damaged" in refused or found == whole
            unnoticed += not refused
            shutil.rmtree(copy)
        assert unnoticed < (75 if file.suffix == ".npy" else 8)  # of 128 bytes of a .npy's header


@pytest.mark.parametrize("kind", ["tokens", "cache"])
def test_shards_in_each_others_place_are_refused(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    folder: Path = request.getfixturevalue(kind)
    names = sorted(path.name for path in folder.iterdir() if "0000" in path.name)
    first, second = names[:2] if kind == "cache" else names[-2:]
    (folder / first).rename(tmp_path / "x")
    (folder / second).rename(folder / first)
    (tmp_path / "x").rename(folder / second)
    with pytest.raises(MolError, match="damaged"):
        {"tokens": read_tokens, "cache": read_cache}[kind](folder)


def test_a_shard_is_checked_when_its_first_row_is_read(cache: Path) -> None:
    file = cache / "logits-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = open_logits(cache, None, vocab_size=VOCAB, length=LENGTH)
    assert found.predictions(torch.tensor([0, 9]))[0].shape == (2, LENGTH, K)
    with pytest.raises(
        MolError, match=r"logits-00001.safetensors does not have the sha256"
    ) as caught:
        found.predictions(torch.tensor([4]))
    assert "--resume" in caught.value.hint
    file.unlink()
    with cache_folder(cache, resume=True):
        write_logits(cache, INDEX, predictions)
    assert len(read_cache(cache)[0]) == ROWS


def test_folders_of_earlier_versions_are_read(tokens: Path, cache: Path) -> None:
    """They had no sum of the index, and none in a shard of logits; their values are checked."""
    whole = [str(read_tokens(tokens)), str(read_cache(cache))]
    for index in (tokens / "tokens.json", cache / "logits.json"):
        content = json.loads(index.read_text())
        del content["sha256"]
        index.write_text(json.dumps(content, indent=2))
    for file in cache.glob("*.safetensors"):
        save_file(load(file.read_bytes()), file)
    assert [str(read_tokens(tokens)), str(read_cache(cache))] == whole
    file = cache / "logits-00000.safetensors"
    tensors = load(file.read_bytes())
    tensors["rest"][2, 1] = torch.nan
    save_file(tensors, file)
    with pytest.raises(MolError, match=r"logits-00000.safetensors has rest of nan in row 2"):
        read_cache(cache)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.5])
@pytest.mark.parametrize("name", ["log_probs", "rest"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_logits_that_are_not_finite_are_never_written(
    tmp_path: Path, name: str, value: float, everywhere: bool
) -> None:
    def predict(first: int, last: int) -> dict[str, torch.Tensor]:
        found = predictions(first, last)
        if first == 4:
            found[name][2 if not everywhere else slice(None), 1] = value
        return found

    with pytest.raises(MolError, match=f"{name} of {value} for row {4 if everywhere else 6} "):
        write_cache(tmp_path / "cache", predict)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        "logits.json",
        "logits-00000.safetensors",
    }


def test_the_rest_of_a_whole_vocabulary_is_no_probability(tmp_path: Path) -> None:
    def predict(first: int, last: int) -> dict[str, torch.Tensor]:
        found = predictions(first, last)
        return found | {"rest": torch.full_like(found["rest"], -torch.inf)}

    assert bool((read_cache(write_cache(tmp_path / "cache", predict))[5] == -torch.inf).all())


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"rows": 2**31, "rows_per_shard": 1, "sources": {"a": 2**31 - 4, "b": 4}}, "lacks 214748"),
        ({"rows": 11}, "do not have its rows"),
        ({"rows": 0}, "rows: 0"),
        ({"rows": True}, "rows: True"),
        ({"rows_per_shard": -4}, "rows_per_shard: -4"),
        ({"rows_per_shard": 10**400}, "is .* not"),
        ({"context_length": 2**31}, "is .* not"),
        ({"top_k": VOCAB + 1}, "top_k above its vocab_size"),
        ({"top_k": 4}, "log_probs|ids"),
        ({"sources": {"a": 10}}, "do not have its rows"),
        ({"sources": {"a": 14, "b": -4}}, "gives b -4 rows"),
        ({"sources": {"a": "6", "b": 4}}, "gives a 6 rows"),
        ({"weights": {"a": 1.0, "b": 0}}, "b a weight of 0"),
        ({"weights": {"a": 1.0, "b": "1"}}, "b a weight of 1"),
        ({"weights": {"a": 1.0, "b": 10**400}}, "b a weight of 1000"),
        ({"weights": []}, "weights"),
        ({"tokenizer": 3}, "tokenizer: 3"),
        ({"format": 9}, "format 9"),
        ({"shard": "/etc/passwd"}, "a field 'shard'"),
        ({"data": None}, "data: None"),
    ],
)
def test_an_index_of_logits_that_cannot_be_is_refused(
    cache: Path, change: dict[str, Any], found: str
) -> None:
    (cache / "logits.json").write_text(json.dumps(INDEX | change))
    for file in cache.glob("*.safetensors"):  # as an earlier version wrote it, without a sum
        save_file(load(file.read_bytes()), file)
    length = change.get("context_length", LENGTH)
    with pytest.raises(MolError, match=found):
        open_logits(cache, None, vocab_size=VOCAB, length=length)


def test_an_index_of_logits_that_is_no_object_is_refused(cache: Path) -> None:
    for content in ("", "[]", "{}", "null", '{"format": NaN}', "[" * 10**5, '{"a": 1' + "0" * 5000):
        (cache / "logits.json").write_text(content)
        with pytest.raises(MolError, match="damaged"):
            read_cache(cache)
        with pytest.raises(MolError, match="damaged"), cache_folder(cache, resume=True):
            write_logits(cache, INDEX, predictions)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"tokens": 39}, "sums of its shards"),
        ({"documents": 8}, "sums of its shards"),
        ({"highest_id": 8}, ".*token ids outside 0 to 8"),
        ({"highest_id": -1}, ".*token ids outside 0 to -1"),
        ({"shards": []}, "names no shards"),
        ({"shards": {}}, "shards: "),
        ({"shards": [3]}, "does not describe shard 0"),
        ({"shards": [{"tokens": 3}]}, "does not describe shard 0"),
        ({"tokenizer": None}, "tokenizer: None"),
        ({"format": "1"}, "format: 1"),
        ({"path": "../tokens-00000.npy"}, "a field 'path'"),
    ],
)
def test_an_index_of_tokens_that_cannot_be_is_refused(
    tokens: Path, change: dict[str, Any], found: str
) -> None:
    content = json.loads((tokens / "tokens.json").read_text())
    del content["sha256"]
    (tokens / "tokens.json").write_text(json.dumps(content | change))
    with pytest.raises(MolError, match=f"damaged: .*{found}"):
        read_tokens(tokens)


@pytest.mark.parametrize("key", ["tokens", "documents", "sha256"])
@pytest.mark.parametrize("value", [None, True, 1.5, -1, 2**31, 10**400, "x", "0" * 64, [], {}])
def test_an_entry_of_tokens_that_cannot_be_is_refused(tokens: Path, key: str, value: Any) -> None:
    content = json.loads((tokens / "tokens.json").read_text())
    del content["sha256"]
    content["shards"][1][key] = value
    (tokens / "tokens.json").write_text(json.dumps(content))
    with pytest.raises(MolError, match="damaged"):
        read_tokens(tokens)


@pytest.mark.parametrize(
    "array",
    [
        np.array([[3, 4], [5, 6]]),
        np.array([3.0, 4.0]),
        np.array([3, 4], dtype=">i8"),
        np.array([2**62] * 4 + [4 * 3]),  # the sum overflows
        np.array([-3, 12]),
        np.array([0, 9]),
        np.array([], dtype=np.int64),
    ],
)
@pytest.mark.parametrize("name", ["tokens-00000.npy", "documents-00000.npy"])
def test_other_arrays_are_refused(tokens: Path, name: str, array: np.ndarray) -> None:
    np.save(tokens / name, array)
    with pytest.raises(MolError, match="damaged"):
        read_tokens(tokens)


def test_arrays_that_would_be_unpickled_or_claim_too_much_are_refused(
    tokens: Path, tmp_path: Path
) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "ran"), "w")

    name = tokens / "documents-00000.npy"
    np.save(name, np.array([Code(), 1], dtype=object), allow_pickle=True)
    with pytest.raises(MolError, match="damaged"):
        read_tokens(tokens)
    assert not (tmp_path / "ran").exists()
    with name.open("wb") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (2**40,)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(MolError, match="damaged"):
        read_tokens(tokens)
    name.write_bytes(b"\x93NUMPY\x01\x00\x00\x20" + b"(" * 0x2000)
    with pytest.raises(MolError, match="damaged"):
        read_tokens(tokens)
    np.savez(tmp_path / "x.npz", np.array([3, 4]))
    (tmp_path / "x.npz").rename(name)
    with pytest.raises(MolError, match="damaged"):
        read_tokens(tokens)
