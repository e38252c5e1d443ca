"""Sampling text from a tiny parent."""

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from molcli.config.sections import SampleConfig
from molcli.data.mixture import load_rows
from molcli.errors import MolError
from molcli.families.parent import open_parent
from molcli.stages import sample as stage
from molcli.stages.sample import _largest_batch, _sample_batch, _wanted, sample

CONFIG = SampleConfig(tokens=600, length=48, batch_size=5, seed=3)


def test_documents_fill_the_budget_and_stop_at_eos(
    tiny_parent: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_parent("llama")
    seen: list[int] = []

    def progress(done: int, total: int | None, note: str = "") -> None:
        assert total == CONFIG.tokens
        seen.append(done)

    sample(open_parent(folder), CONFIG, tmp_path / "a.jsonl", progress=progress)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    documents = [row["input_ids"] for row in rows]
    assert 600 <= sum(map(len, documents)) < 600 + 5 * 48
    assert seen == sorted(seen)
    assert seen[-1] == 600
    assert {ids[0] for ids in documents} == {1}
    assert all(2 not in ids[:-1] for ids in documents)
    assert all(ids[-1] == 2 for ids in documents if len(ids) < 48)
    assert any(len(ids) < 48 for ids in documents)
    assert any(len(ids) == 48 for ids in documents)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [row["text"] for row in rows] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in documents
    ]
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["a.jsonl"]


def test_the_seed_decides(tiny_parent: Callable[..., Path], tmp_path: Path) -> None:
    parent = open_parent(tiny_parent("llama", tokenizer=False))
    files = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        sample(parent, SampleConfig(tokens=100, length=20, batch_size=3, seed=seed), file)
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_a_part_of_the_tokens_may_repeat_the_others(
    tiny_parent: Callable[..., Path], tmp_path: Path
) -> None:
    parent = open_parent(tiny_parent("llama"))
    config = SampleConfig(tokens=6000, length=96, batch_size=20)
    files = {}
    for name, share in {"plain": 0.0, "mixed": 0.4, "again": 0.4}.items():
        sample(parent, replace(config, repeats=share), tmp_path / f"{name}.jsonl")
        files[name] = (tmp_path / f"{name}.jsonl").read_text().splitlines()
    assert files["mixed"] == files["again"]
    found = [json.loads(line)["input_ids"] for line in files["mixed"]]
    # The sampled documents are those of a run without, as far as they go.
    whole = [ids for ids in found if len(set(triples(ids))) == len(ids) - 2]
    doubled = [ids for ids in found if len(set(triples(ids))) < len(ids) - 8]
    assert len(whole) + len(doubled) == len(found)
    tokens = sum(map(len, found))
    assert sum(map(len, doubled)) / tokens == pytest.approx(0.4, abs=96 / tokens)
    assert 6000 <= tokens < 6000 + 2 * 96
    said = {token for ids in whole for token in ids}
    for ids in doubled:
        assert len(ids) == 96 and ids[0] == 1 and 1 not in ids[1:] and 2 not in ids
        assert set(ids) <= said
    assert [json.loads(line)["input_ids"] for line in files["plain"]][:20] == whole[:20]
    places = [i for i, ids in enumerate(found) if ids in doubled]
    assert max(b - a for a, b in pairwise(places)) < 8  # they are spread


def triples(ids: list[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]


def test_a_parent_without_tokenizer_gives_data_that_packs(
    tiny_parent: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "a.jsonl"
    config = SampleConfig(tokens=100, length=20, batch_size=3)
    sample(open_parent(tiny_parent("qwen3", tokenizer=False)), config, out)
    assert set(json.loads(out.read_text().splitlines()[0])) == {"input_ids"}
    assert load_rows(str(out), None, vocab_size=128, length=16).tokens >= 80


class Chained:
    """A model whose next token depends on all tokens so far, which it reads from its cache. The
    first token is arbitrary."""

    device = torch.device("cpu")
    config = PreTrainedConfig(bos_token_id=1, eos_token_id=0, num_hidden_layers=1)
    generation_config = GenerationConfig()
    vocab_size = 13

    @classmethod
    def follows(cls, tokens: list[int]) -> int:
        return zlib.crc32(bytes(tokens)) % cls.vocab_size

    def __call__(
        self,
        input_ids: torch.Tensor,
        use_cache: bool,
        logits_to_keep: int,
        **cache: DynamicCache,
    ) -> SimpleNamespace:
        new = input_ids[:, None, :, None].float()
        (held,) = cache.values()  # under the name that the installed transformers has for it
        seen = held.update(new, new, 0)[0][:, 0, :, 0].long()
        logits = torch.zeros(len(seen), 1, self.vocab_size)
        if seen.shape[1] > 1:
            for row, tokens in enumerate(seen.tolist()):
                logits[row, 0, self.follows(tokens)] = 1e4
        return SimpleNamespace(logits=logits)


def test_documents_that_leave_the_batch_do_not_disturb_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    model: Any = Chained()
    config = SampleConfig(length=9)
    documents = _sample_batch(model, [[1]] * 40, config, generator, lambda drawn, most: None)
    assert len({len(ids) for ids in documents}) > 3
    for ids in documents:
        assert all(ids[i] == Chained.follows(ids[:i]) for i in range(2, len(ids)))
        assert 0 not in ids[:-1]
        assert len(ids) == 9 or ids[-1] == 0


def test_prompts_of_any_length_are_continued_from_all_of_their_tokens() -> None:
    """An end token within a prompt ends nothing."""
    generator = torch.Generator().manual_seed(0)
    starts = [[1 + i % 12, 0, *range(1, 1 + i % 5)] for i in range(40)]
    model: Any = Chained()
    seen: list[int] = []

    def report(drawn: int, most: int) -> None:
        assert drawn <= most <= 40 * 12
        seen.append(drawn)

    documents = _sample_batch(model, starts, SampleConfig(length=12), generator, report)
    assert len({len(ids) for ids in documents}) > 3
    for ids, start in zip(documents, starts, strict=True):
        assert ids[: len(start)] == start and len(ids) > len(start)
        assert all(ids[i] == Chained.follows(ids[:i]) for i in range(len(start), len(ids)))
        assert 0 not in ids[len(start) : -1]
        assert len(ids) == 12 or ids[-1] == 0
    assert seen == sorted(seen) and seen[-1] == sum(map(len, documents))


def test_prompts_are_used_in_rotation(tiny_parent: Callable[..., Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the quick brown\n\na lazy dog sleeps\n\nwhile\n")
    folder = tiny_parent("llama")
    config = SampleConfig(tokens=150, length=30, batch_size=2, prompts=str(prompts))
    sample(open_parent(folder), config, tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["the quick brown", "a lazy dog sleeps", "while"]
    assert len(rows) > 3
    for i, row in enumerate(rows):
        start = tokenizer(texts[i % 3])["input_ids"]
        assert row["input_ids"][: len(start)] == start and len(row["input_ids"]) > len(start)


def test_long_prompts_are_cut_to_their_first_tokens(
    tiny_parent: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"input_ids": [3, 4, 5, 6, 7, 8, 9]}\n{"input_ids": [11]}\n')
    config = SampleConfig(tokens=24, length=6, batch_size=2, prompts=str(prompts), prompt_length=4)
    sample(open_parent(tiny_parent("llama")), config, tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {tuple(row["input_ids"][:4]) for row in rows[::2]} == {(3, 4, 5, 6)}
    assert all(4 < len(row["input_ids"]) <= 6 for row in rows[::2])
    assert {row["input_ids"][0] for row in rows[1::2]} == {11}


def test_a_prompt_that_is_too_long_is_refused_and_leaves_no_file(
    tiny_parent: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"input_ids": [3]}\n' * 3 + '{"input_ids": [3, 4, 5, 6]}\n')
    config = SampleConfig(tokens=100, length=4, batch_size=2, prompts=str(prompts))
    with pytest.raises(MolError, match=r"has 4 tokens, and a document 4"):
        sample(open_parent(tiny_parent("llama")), config, tmp_path / "a.jsonl")
    assert not list(tmp_path.glob("*a.jsonl*"))


def test_an_existing_file_is_refused(tiny_parent: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(MolError, match="exists"):
        sample(open_parent(tiny_parent("llama")), CONFIG, tmp_path / "a.jsonl")


def test_two_runs_do_not_write_one_file(tiny_parent: Callable[..., Path], tmp_path: Path) -> None:
    parent, refused = open_parent(tiny_parent("llama")), []

    def again(done: int, total: int | None, note: str = "") -> None:
        with pytest.raises(MolError, match="another run is writing") as caught:
            sample(parent, CONFIG, tmp_path / "a.jsonl")
        refused.append(caught.value)

    sample(parent, CONFIG, tmp_path / "a.jsonl", progress=again)
    sample(parent, CONFIG, tmp_path / "b.jsonl")
    assert refused
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_predictions_that_are_not_finite_are_refused() -> None:
    class Undefined(Chained):
        def __call__(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
            found = super().__call__(*args, **kwargs)
            found.logits[2] = torch.nan
            return found

    model: Any = Undefined()
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(MolError, match=r"not finite .NaN. at token 1 "):
        _sample_batch(model, [[1]] * 4, SampleConfig(length=9), generator, lambda drawn: None)


def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample from a model of ours, as on a GPU, with the kernels' references."""
    monkeypatch.setattr(stage, "backend", SimpleNamespace(use_triton=lambda x: True))


def test_a_model_of_ours_samples_with_the_kernels(
    tiny_parent: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_kernels(monkeypatch)
    monkeypatch.setattr(stage, "_sample_batch", None)
    test_documents_fill_the_budget_and_stop_at_eos(tiny_parent, tmp_path)
    (tmp_path / "prompts").mkdir()
    test_prompts_are_used_in_rotation(tiny_parent, tmp_path / "prompts")
    (tmp_path / "seeds").mkdir()
    test_the_seed_decides(tiny_parent, tmp_path / "seeds")


def test_documents_longer_than_a_sliding_window_are_those_of_transformers(
    tiny_parent: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = open_parent(tiny_parent("mistral", sliding_window=8, tokenizer=False))
    config = SampleConfig(tokens=60, length=20, batch_size=3)
    sample(parent, config, tmp_path / "a.jsonl")
    with_kernels(monkeypatch)
    sample(parent, config, tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_later_batch_asks_for_a_few_more_documents() -> None:
    """So that a last batch of a few documents, as slow as a full one, is unlikely."""
    assert _wanted(1_000_000, 500, 0, 0) == 2000
    assert _wanted(400_000, 500, 600_000, 2000) == pytest.approx(400_000 / 300 * 1.046, rel=0.001)


def test_batch_size_follows_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M's shape: 23 kB of keys and values a token, 0.9 MB of odds a document."""
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
    )
    model: Any = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cuda"))

    def with_gb(memory: int, length: int) -> int:
        properties = SimpleNamespace(total_memory=memory * 10**9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        return _largest_batch(model, length)

    assert with_gb(80, 128) == 8192
    assert with_gb(80, 512) == 40 * 10**9 // (512 * 23_040 + 49_152 * 18)
    assert with_gb(1, 10**6) == 1
    model.device = torch.device("cpu")
    assert with_gb(80, 128) == 64


def test_a_stale_duplicate_in_a_later_shard_is_not_sampled_from(
    tiny_parent: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_parent("llama", tokenizer=False)
    config = SampleConfig(tokens=100, length=20, batch_size=3)
    sample(open_parent(folder), config, tmp_path / "clean.jsonl")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    moved = "model.embed_tokens.weight"
    rest = {name: tensor for name, tensor in tensors.items() if name != moved}
    stale = {moved: tensors[moved].flip(0).contiguous()}
    save_file({moved: tensors[moved]}, folder / "a.safetensors")
    save_file(rest | stale, folder / "b.safetensors")
    index = {name: "a.safetensors" if name == moved else "b.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    weights.unlink()
    sample(open_parent(folder), config, tmp_path / "stale.jsonl")
    assert (tmp_path / "stale.jsonl").read_bytes() == (tmp_path / "clean.jsonl").read_bytes()
