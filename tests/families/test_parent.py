"""Parents open strictly, and give every tensor under MoL's name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from molcli.errors import MolError
from molcli.families import parent as parent_module
from molcli.families.parent import open_parent
from molcli.files.tensors import TensorReader

HF_NAME = {
    "block.input_norm": "input_layernorm.weight",
    "block.post_norm": "post_attention_layernorm.weight",
    **{f"block.mixer.{p}_proj": f"self_attn.{p}_proj.weight" for p in "qkvo"},
    **{f"block.mixer.{p}_bias": f"self_attn.{p}_proj.bias" for p in "qkvo"},
    **{f"block.mixer.{p}_norm": f"self_attn.{p}_norm.weight" for p in "qk"},
    **{f"block.mlp.{p}_proj": f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
}
BIASES = {f"block.mixer.{p}_bias" for p in "qkvo"}
QK_NORMS = {"block.mixer.q_norm", "block.mixer.k_norm"}
PLAIN = set(HF_NAME) - BIASES - QK_NORMS

CASES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("llama", {}, PLAIN),
    ("llama", {"attention_bias": True, "tie_word_embeddings": False}, PLAIN | BIASES),
    ("mistral", {}, PLAIN),
    ("qwen2", {}, PLAIN | BIASES - {"block.mixer.o_bias"}),
    ("qwen3", {}, PLAIN | QK_NORMS),
    ("qwen3", {"attention_bias": True}, PLAIN | QK_NORMS | BIASES),
]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, add: dict[str, torch.Tensor], drop: str = "") -> None:
    tensors = load_file(folder / "model.safetensors") | add
    tensors.pop(drop, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("family", "config", "names"), CASES)
@pytest.mark.parametrize("sharded", [False, True])
def test_every_tensor_arrives_under_our_name(
    tiny_parent, family: str, config: dict[str, Any], names: set[str], sharded: bool
) -> None:
    folder = tiny_parent(family, sharded=sharded, **config)
    assert (folder / "model.safetensors.index.json").exists() == sharded
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    parent = open_parent(folder)
    consumed = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}

    assert torch.equal(parent.embedding(), state["model.embed_tokens.weight"])
    assert torch.equal(parent.final_norm(), state["model.norm.weight"])
    head = parent.lm_head()
    assert (head is None) == parent.config.tie_word_embeddings
    assert head is None or torch.equal(head, state["lm_head.weight"])
    for i in range(2):
        layer = parent.dense_layer(i)
        assert set(layer) == names
        for ours, tensor in layer.items():
            theirs = f"model.layers.{i}.{HF_NAME[ours]}"
            consumed.add(theirs)
            assert torch.equal(tensor, state[theirs][None]), ours
    assert consumed == set(state)


@pytest.mark.parametrize(("family", "config", "names"), CASES)
def test_mol_config_kwargs_describe_the_tensors(
    tiny_parent, family: str, config: dict[str, Any], names: set[str]
) -> None:
    parent = open_parent(tiny_parent(family, **config))
    kwargs = parent.mol_config_kwargs()
    layer = parent.dense_layer(0)
    heads, kv_heads, width = (
        kwargs[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    assert layer["block.mixer.q_proj"].shape == (1, heads * width, kwargs["hidden_size"])
    assert layer["block.mixer.k_proj"].shape == (1, kv_heads * width, kwargs["hidden_size"])
    assert layer["block.mlp.up_proj"].shape[1] == kwargs["intermediate_size"]
    assert kwargs["attention_bias"] == ("block.mixer.q_bias" in names)
    assert kwargs["attention_out_bias"] == ("block.mixer.o_bias" in names)
    assert kwargs["qk_norm"] == ("block.mixer.q_norm" in names)
    assert kwargs["tie_word_embeddings"] == (parent.lm_head() is None)
    assert kwargs["layer_structures"] == ["dense", "dense"]
    assert kwargs["rope_parameters"]["rope_theta"] == 10_000.0


@pytest.mark.parametrize("sharded", [False, True])
def test_fused_projections_are_split_on_reading(tiny_parent, sharded: bool) -> None:
    folder = tiny_parent("phi3", sharded=sharded)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    parent = open_parent(folder)
    for i in range(2):
        layer = parent.dense_layer(i)
        assert set(layer) == PLAIN
        for fused, names in (
            ("self_attn.qkv_proj", ["mixer.q_proj", "mixer.k_proj", "mixer.v_proj"]),
            ("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            parts = torch.cat([layer[f"block.{name}"][0] for name in names])
            assert torch.equal(parts, state[f"model.layers.{i}.{fused}.weight"])
    assert layer["block.mixer.k_proj"].shape == (1, 32, 64)  # 2 key-value heads of 16


def test_longrope_caps_the_context_where_its_frequencies_change(tiny_parent) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    }
    folder = tiny_parent("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    parent = open_parent(folder)
    kwargs = parent.mol_config_kwargs()
    assert kwargs["max_position_embeddings"] == 64
    assert "max_position_embeddings becomes 64" in parent.note
    assert kwargs["rope_parameters"]["factor"] == 4  # of 256 positions


def test_old_config_without_head_dim_and_rope_parameters(tiny_parent) -> None:
    folder = tiny_parent("llama")
    config = json.loads((folder / "config.json").read_text())
    del config["head_dim"], config["rope_parameters"]
    config |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(config))
    kwargs = open_parent(folder).mol_config_kwargs()
    assert kwargs["head_dim"] == 16
    rope = kwargs["rope_parameters"]
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("linear", 5e5, 2.0)


def test_stored_dtype_is_kept(tiny_parent) -> None:
    parent = open_parent(tiny_parent("qwen2", dtype=torch.bfloat16))
    assert {t.dtype for t in parent.dense_layer(1).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("family", "config", "positions"),
    [
        ("mistral", {"sliding_window": 32}, 32),
        ("mistral", {"sliding_window": 4096}, 256),
        ("mistral", {"sliding_window": None}, 256),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, 32),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}, 256),
        ("qwen3", {"sliding_window": 32, "use_sliding_window": False}, 256),
        ("llama", {"sliding_window": 32}, 256),  # Llama's model ignores the key
    ],
)
def test_sliding_window_caps_the_context(
    tiny_parent, family: str, config: dict[str, Any], positions: int
) -> None:
    parent = open_parent(tiny_parent(family, **config))
    assert parent.mol_config_kwargs()["max_position_embeddings"] == positions
    assert ("last 32 tokens" in parent.note) == (positions == 32)


def test_redundant_tensors_are_skipped(tiny_parent) -> None:
    folder = tiny_parent("llama")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in (0, 1)}
    edit_weights(folder, {"lm_head.weight": embedding.clone(), **frequencies})
    parent = open_parent(folder)
    assert parent.tied
    assert parent.lm_head() is None


def test_a_head_that_differs_is_kept_whatever_the_config_says(tiny_parent) -> None:
    folder = tiny_parent("llama")
    head = torch.randn(128, 64)
    edit_weights(folder, {"lm_head.weight": head})
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(theirs.lm_head.weight, head), "transformers does the same"
    parent = open_parent(folder)
    assert torch.equal(parent.lm_head(), head)
    assert parent.mol_config_kwargs()["tie_word_embeddings"] is False


def test_tokenizer_survives_the_copy(tiny_parent, tmp_path: Path) -> None:
    parent = open_parent(tiny_parent("qwen3"))
    parent.copy_tokenizer(tmp_path / "out")
    text = "the quick brown layer 42"
    copied = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert copied(text).input_ids == parent.tokenizer()(text).input_ids
    assert copied.decode(copied(text).input_ids) == text


def test_parent_without_tokenizer(tiny_parent, tmp_path: Path) -> None:
    parent = open_parent(tiny_parent("llama", tokenizer=False))
    assert parent.tokenizer() is None
    parent.copy_tokenizer(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_opening_reads_headers_only(tiny_parent, monkeypatch) -> None:
    folder = tiny_parent("qwen3")
    monkeypatch.setattr(TensorReader, "read", lambda self, name: pytest.fail(f"read {name}"))
    open_parent(folder)


def test_fingerprint_tells_fine_tunes_apart(tiny_parent) -> None:
    folder = tiny_parent("llama")
    before = open_parent(folder).fingerprint()
    assert open_parent(folder).fingerprint() == before
    edit_weights(folder, {"model.norm.weight": torch.full((64,), 0.5)})
    assert open_parent(folder).fingerprint() != before
    assert open_parent(tiny_parent("llama", sharded=True)).fingerprint() == before


def test_hub_id_is_downloaded_after_its_config_passed(tiny_parent, monkeypatch) -> None:
    hub = {"org/good": tiny_parent("qwen2"), "org/gpt2": tiny_parent("llama")}
    edit_config(hub["org/gpt2"], model_type="gpt2")
    asked: list[tuple[str, int]] = []

    def snapshot_download(repo: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo, len(allow_patterns)))
        return str(hub[repo])

    monkeypatch.setattr(parent_module, "snapshot_download", snapshot_download)
    parent = open_parent("org/good")
    assert parent.name == "org/good"
    assert parent.folder == hub["org/good"]
    with pytest.raises(MolError, match="'gpt2'"):
        open_parent("org/gpt2")
    assert [repo for repo, _ in asked] == ["org/good", "org/good", "org/gpt2"]


def test_parent_moved_into_a_home_path(tiny_parent, monkeypatch, tmp_path: Path) -> None:
    shutil.move(tiny_parent("llama"), tmp_path / "home" / "model")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_parent("~/model").name == "~/model"
