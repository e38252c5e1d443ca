"""What is no parent is refused before any work, with what was found and what is allowed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from molcli.errors import MolError
from molcli.families import parent as parent_module
from molcli.families.parent import open_parent


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, add: dict[str, torch.Tensor], drop: str = "") -> None:
    tensors = load_file(folder / "model.safetensors") | add
    tensors.pop(drop, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt2", "LayerNorms with biases, learned positions"),
        ("gemma", r"1 \+ weight"),
        ("gemma2", "norms behind attention and FFN .* soft caps"),
        ("gemma3", "an image encoder"),
        ("olmo", "LayerNorms without weights"),
        ("olmo3", "norms of OLMo-2, and sliding windows"),
        ("mixtral", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("bert", None),
        ("llama4", None),
    ],
)
def test_other_families_are_refused_with_the_reason(
    tmp_path: Path, model_type: str, reason: str | None
) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    expected = f"is a model of type '{model_type}'" + (f", which .*{reason}" if reason else "$")
    with pytest.raises(MolError) as error:
        open_parent(tmp_path)
    assert re.search(expected, error.value.found)
    assert "llama, mistral, qwen2, qwen3, phi3, gemma3_text, olmo2" in error.value.allowed


def test_experts_are_refused_with_a_dense_parent_of_their_series(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(MolError, match="not one dense FFN a layer") as error:
        open_parent(tmp_path)
    assert "Qwen/Qwen3-0.6B" in error.value.hint


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"mlp_bias": True}, "mlp_bias: true"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            r"partial_rotary_factor: 0\.5",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized \(gptq\)"),
        ({"num_hidden_layers": 3}, r"missing: model.layers.2.\S+.* \(9 in all\)"),
        ({"num_hidden_layers": 1}, r"left over: model.layers.1.\S+.* \(9 in all\)"),
        ({"attention_bias": True}, "missing: model.layers.0.self_attn.q_proj.bias"),
        ({"tie_word_embeddings": False}, "missing: lm_head.weight"),
        ({"intermediate_size": 100}, r"gate_proj.weight in .* has shape \(96, 64\)"),
        ({"vocab_size": 130}, r"embed_tokens.weight in .* has shape \(128, 64\)"),
        ({"hidden_size": "wide"}, "has hidden_size: wide"),
        ({"hidden_size": 63}, "not a valid llama config"),
    ],
)
def test_config_that_contradicts_the_weights(tiny_parent, changes, found: str) -> None:
    folder = tiny_parent("llama")
    edit_config(folder, **changes)
    with pytest.raises(MolError, match=found):
        open_parent(folder)


def test_unknown_and_quantized_tensors(tiny_parent) -> None:
    folder = tiny_parent("llama")
    edit_weights(folder, {"score.weight": torch.ones(2, 64)})
    with pytest.raises(MolError, match=r"left over: score.weight \(1 in all\)"):
        open_parent(folder)
    edit_weights(folder, {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, "score.weight")
    with pytest.raises(MolError, match=r"model.norm.weight in .* stored as I8"):
        open_parent(folder)


def test_tokenizer_larger_than_the_vocabulary(tiny_parent) -> None:
    folder = tiny_parent("llama", vocab_size=64)
    with pytest.raises(MolError, match=r"has \d+ tokens, but the model's vocab_size is 64"):
        open_parent(folder)


def test_damaged_tokenizer(tiny_parent) -> None:
    folder = tiny_parent("llama")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(MolError, match=r"tokenizer in .* cannot be read"):
        open_parent(folder)


def test_specs_that_are_no_model(tmp_path: Path) -> None:
    for name in ("missing/model/folder", "./missing", "missing.gguf", str(tmp_path / "missing")):
        with pytest.raises(MolError, match="does not exist"):
            open_parent(name)
    with pytest.raises(MolError, match=r"has no config.json"):
        open_parent(tmp_path)
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(MolError, match=r"config.json cannot be read \(Expecting value"):
        open_parent(tmp_path)
    with pytest.raises(MolError, match="file that is not GGUF"):
        open_parent(tmp_path / "config.json")


def test_hub_failure_names_the_reason(monkeypatch) -> None:
    def snapshot_download(repo: str, *, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no connection\nmore lines")

    monkeypatch.setattr(parent_module, "snapshot_download", snapshot_download)
    with pytest.raises(MolError, match=r"the Hub did not give it \(no connection\)"):
        open_parent("org/model")
