"""GGUF files become the very model that transformers reads from them."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from molcli.errors import MolError
from molcli.families.gguf import _cache_folder, _weights, convert_gguf
from molcli.families.parent import open_parent, outline
from molcli.files.folders import lock_for

GGUF_MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"},
    **{f"self_attn.{p}_norm": f"attn_{p}_norm" for p in "qk"},
}
# Of families with norms behind attention and FFN; Gemma 3 has one before the FFN as well.
GGUF_OUTPUT_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GGUF_GLOBALS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str, family: str) -> str:
    if name in GGUF_GLOBALS:
        return GGUF_GLOBALS[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    behind = GGUF_OUTPUT_NORMS if family in ("gemma3_text", "olmo2") else {}
    return f"blk.{layer}.{(GGUF_MODULES | behind)[module]}.{kind}"


def permuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to Llama's queries and keys."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def write_gguf(
    path: Path, folder: Path, *, dtype: str = "f32", extra: dict[str, Any] | None = None
) -> Path:
    """Writes a parent's folder, with its byte-pair tokenizer if it has one, as llama.cpp would."""
    parent = open_parent(folder)
    config, family = parent.config, parent.family.model_type
    arch = "gemma3" if family == "gemma3_text" else family
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if arch in ("qwen3", "gemma3"):
        writer.add_key_length(config.head_dim)
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_uint32("gemma3.attention.sliding_window_pattern", 2)
        local = rope["sliding_attention"]["rope_theta"]
        writer.add_float32("gemma3.rope.freq_base_swa", local)
    for key, value in (extra or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add.get(type(value), writer.add_array if isinstance(value, list) else writer.add_string)(
            key, value
        )
    if (folder / "tokenizer.json").exists():
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(list(tokenizer["model"]["vocab"]))
        writer.add_token_types([3] * 3 + [1] * (len(tokenizer["model"]["vocab"]) - 3))
        writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
        writer.add_unk_token_id(0)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if arch == "llama" and ".q_proj." in name:
            tensor = permuted(tensor, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            tensor = permuted(tensor, config.num_key_value_heads)
        if arch == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        array, quantize = tensor.float().numpy(), dtype != "f32" and tensor.ndim > 1
        kind = gguf.GGMLQuantizationType[dtype.upper()] if quantize else None
        data = gguf.quants.quantize(array, kind) if kind is not None else array
        writer.add_tensor(gguf_name(name, family), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "molcli"


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        # In bfloat16, adding the 1 of Gemma's norms and taking it away again is exact.
        ("gemma3_text", {"query_pre_attn_scalar": 32, "dtype": torch.bfloat16}),
        ("olmo2", {}),
    ],
)
def test_round_trip(tiny_parent, tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    folder = tiny_parent(family, tokenizer=False, **config)
    original = open_parent(folder)
    parent = open_parent(write_gguf(tmp_path / "m.gguf", folder))
    assert parent.fingerprint() == original.fingerprint()
    ours, theirs = parent.mol_config_kwargs(), original.mol_config_kwargs()
    assert ours.pop("rms_norm_eps") == pytest.approx(theirs.pop("rms_norm_eps"), rel=1e-7)
    assert ours.pop("pad_token_id") is None
    assert theirs.pop("pad_token_id") == 2
    assert ours == theirs
    for name, tensor in original.dense_layer(1).items():
        assert torch.equal(parent.dense_layer(1)[name], tensor)


def test_an_outline_reads_metadata_only(tiny_parent, tmp_path: Path, cache: Path) -> None:
    folder = tiny_parent("qwen3")
    found = outline(write_gguf(tmp_path / "model.gguf", folder))
    assert not cache.exists()
    expected = open_parent(folder).mol_config_kwargs()
    del found["dtype"]
    del found["pad_token_id"], expected["pad_token_id"]  # not written to this file
    assert found.pop("rms_norm_eps") == pytest.approx(expected.pop("rms_norm_eps"), rel=1e-7)
    assert found == expected


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_transformers_reads_the_same_weights(tiny_parent, tmp_path: Path, family: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_parent(family, tokenizer=False), dtype="q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(open_parent(path).folder).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_bfloat16_where_it_is_exact(tiny_parent, tmp_path: Path) -> None:
    exact = tiny_parent("qwen3", tokenizer=False, dtype=torch.bfloat16)
    inexact = tiny_parent("qwen3", tokenizer=False)
    for folder, dtype in ((exact, torch.bfloat16), (inexact, torch.float32)):
        parent = open_parent(write_gguf(tmp_path / f"{folder.name}.gguf", folder))
        assert {t.dtype for t in parent.dense_layer(0).values()} == {dtype}
        assert parent.config.dtype == dtype
        assert torch.equal(parent.embedding(), open_parent(folder).embedding())


def test_tokenizer_comes_along(tiny_parent, tmp_path: Path, capfd) -> None:
    folder = tiny_parent("llama")
    path = write_gguf(tmp_path / "m.gguf", folder)
    capfd.readouterr()
    tokenizer = open_parent(path).tokenizer()
    assert capfd.readouterr() == ("", "")
    text = "the quick router sleeps 42"
    assert tokenizer(text).input_ids == open_parent(folder).tokenizer()(text).input_ids
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize(
    "extra, ends",
    [
        ({}, 2),
        ({"eot": 2}, 2),
        ({"eot": 7, "eom": 9}, [2, 7, 9]),
    ],
)
def test_all_its_ends_come_along(tiny_parent, tmp_path: Path, extra, ends) -> None:
    keys = {f"tokenizer.ggml.{name}_token_id": token for name, token in extra.items()}
    parent = open_parent(write_gguf(tmp_path / "m.gguf", tiny_parent("llama"), extra=keys))
    assert parent.generation == {"bos_token_id": 1, "eos_token_id": ends}
    assert parent.mol_config_kwargs()["eos_token_id"] == ends
    assert parent.tokenizer().eos_token == "</s>"


def test_the_file_is_parsed_once(tiny_parent, tmp_path: Path, monkeypatch) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_parent("llama"))
    reader, parse = gguf.GGUFReader, gguf.GGUFReader.__init__
    parsed = []

    def count(self: gguf.GGUFReader, source: Path) -> None:
        if type(self) is not reader:  # transformers 5.17 reads its tokenizer with the class itself
            parsed.append(source)
        parse(self, source)

    monkeypatch.setattr(reader, "__init__", count)
    assert open_parent(path).tokenizer() is not None
    assert parsed == [path]
    assert gguf.GGUFReader is reader


@pytest.mark.parametrize("rows", [7, 24, 32])
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "BF16", "F16", "F32"])
def test_weights_are_those_of_gguf(tmp_path: Path, kind: str, rows: int) -> None:
    dtype = gguf.GGMLQuantizationType[kind]
    numbers = torch.linspace(-3, 2, rows * 64).view(rows, 64).numpy()
    quantized = gguf.quants.quantize(numbers, dtype)
    tensor = SimpleNamespace(data=quantized, tensor_type=dtype, shape=np.array([64, rows]))
    expected = gguf.dequantize(quantized, dtype)
    assert np.array_equal(_weights(tensor).numpy(), expected)
    assert not np.array_equal(expected, np.zeros_like(numbers))


def test_conversion_is_cached_until_the_file_changes(
    tiny_parent, tmp_path: Path, cache: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_parent("qwen2", tokenizer=False))
    first = convert_gguf(path)
    stamp = (first / "config.json").stat().st_mtime_ns
    assert convert_gguf(path) == first
    assert first.parent == cache
    assert (first / "config.json").stat().st_mtime_ns == stamp
    write_gguf(path, tiny_parent("qwen2", tokenizer=False, rms_norm_eps=1e-5))
    assert convert_gguf(path) != first
    assert convert_gguf(path, tmp_path / "given") == tmp_path / "given"
    assert open_parent(tmp_path / "given").config.rms_norm_eps == pytest.approx(1e-5)


def test_who_asks_while_another_converts_waits_for_it(tiny_parent, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_parent("qwen2", tokenizer=False))
    folder = _cache_folder(path)
    with ThreadPoolExecutor() as other, lock_for(folder):
        waiting = other.submit(convert_gguf, path)
        convert_gguf(path, folder)
        stamp = (folder / "config.json").stat().st_mtime_ns
    assert waiting.result() == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("architecture", "reason"), [("gemma2", "soft caps"), ("phi3", "fused projections")]
)
def test_other_architectures_are_refused(
    tmp_path: Path, cache: Path, architecture: str, reason: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(MolError, match=f"type '{architecture}', .*{reason}"):
        open_parent(tmp_path / "m.gguf")
    assert not cache.exists()


@pytest.mark.parametrize(
    "keys", [{"scaling.type": "yarn"}, {"scaling.factor": 4.0, "scaling.attn_factor": 1.2}]
)
def test_rope_scaling_is_refused(
    tiny_parent, tmp_path: Path, cache: Path, keys: dict[str, Any]
) -> None:
    folder = tiny_parent("llama", tokenizer=False)
    extra = {f"llama.rope.{key}": value for key, value in keys.items()}
    path = write_gguf(tmp_path / "m.gguf", folder, extra=extra)
    with pytest.raises(MolError, match="scales its rotary frequencies"):
        open_parent(path)
    assert not cache.exists()


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"scaling.factor": 4.0}, LINEAR),  # llama.cpp: linear where no type is given
        ({"scaling.type": "linear", "scaling.factor": 4.0}, LINEAR),
        ({"scale_linear": 4.0}, LINEAR),  # the older key
        ({"scaling.type": "none", "scaling.factor": 4.0}, {"rope_type": "default"}),
        ({"scaling.type": "linear", "scaling.factor": 1.0}, {"rope_type": "default"}),
        ({"scaling.factor": 0.0}, {"rope_type": "default"}),
        ({"dimension_count": 16}, {"rope_type": "default"}),
    ],
)
def test_linear_rope_scaling(
    tiny_parent, tmp_path: Path, keys: dict[str, Any], rope: dict[str, Any]
) -> None:
    folder = tiny_parent("llama", tokenizer=False)
    extra = {f"llama.rope.{key}": value for key, value in keys.items()}
    parent = open_parent(write_gguf(tmp_path / "m.gguf", folder, extra=extra))
    # The same as a parent in safetensors with these parameters.
    edited = json.loads((folder / "config.json").read_text())
    edited["rope_parameters"] = rope | {"rope_theta": 10_000.0}
    (folder / "config.json").write_text(json.dumps(edited))
    expected = open_parent(folder).mol_config_kwargs()["rope_parameters"]
    assert parent.mol_config_kwargs()["rope_parameters"] == expected


def test_global_layers_of_gemma_are_scaled(tiny_parent, tmp_path: Path) -> None:
    extra = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    folder = tiny_parent("gemma3_text", tokenizer=False)
    kwargs = open_parent(write_gguf(tmp_path / "m.gguf", folder, extra=extra)).mol_config_kwargs()
    wanted = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert kwargs["rope_parameters"] == wanted
    assert kwargs["rope_theta_local"] == 1e3


@pytest.mark.parametrize(
    ("family", "keys", "found"),
    [
        ("llama", {"block_count": 2**31}, "num_hidden_layers: 2147483648"),
        ("llama", {"block_count": 3}, "does not match its metadata in 9 tensors"),
        ("llama", {"attention.head_count": 0}, "num_attention_heads: 0"),
        ("llama", {"attention.head_count_kv": 3}, "num_key_value_heads: 3"),
        ("llama", {"attention.head_count": "four"}, "num_attention_heads: four"),
        ("llama", {"attention.head_count_kv": [2, 2]}, r"num_key_value_heads: \[2, 2\]"),
        ("llama", {"embedding_length": 32}, "does not match its metadata"),
        ("llama", {"rope.freq_base": float("nan")}, "rope_theta: nan"),
        ("llama", {"rope.dimension_count": 8}, "rotates 8 of 16 channels"),
        ("llama", {"attention.layer_norm_rms_epsilon": float("inf")}, "rms_norm_eps: inf"),
        ("llama", {"expert_count": 4}, "llama.expert_count: 4"),
        ("llama", {"attention.scale": 0.5}, "llama.attention.scale: 0.5"),
        ("llama", {"attention.causal": False}, "llama.attention.causal: False"),
        ("olmo2", {"attention.sliding_window": 64}, "llama.cpp stores OLMo-3 so"),
        ("gemma3_text", {"attention.sliding_window_pattern": "odd"}, "describes no model"),
    ],
)
def test_metadata_that_no_model_has(
    tiny_parent, tmp_path: Path, cache: Path, family: str, keys: dict[str, Any], found: str
) -> None:
    path = tmp_path / "m.gguf"
    prefix = "gemma3" if family == "gemma3_text" else family
    with pytest.MonkeyPatch.context() as patch:  # a key that is written twice is the second value
        patch.setattr(gguf.gguf_writer.logger, "disabled", True)
        patch.setattr(gguf.GGUFWriter, "add_key_value", _replacing)
        extra = {f"{prefix}.{key}": value for key, value in keys.items()}
        write_gguf(path, tiny_parent(family, tokenizer=False), extra=extra)
    for read in (open_parent, outline):
        with pytest.raises(MolError, match=found):
            read(path)
    assert not cache.exists()


def _replacing(self: gguf.GGUFWriter, key: str, *rest: Any, **options: Any) -> None:
    value, kind = rest
    self.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value=value, type=kind, **options)


def test_special_tokens_beyond_the_vocabulary_are_none(tiny_parent, tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.padding_token_id": 2**32 - 1}
    folder = tiny_parent("llama", tokenizer=False)
    parent = open_parent(write_gguf(tmp_path / "m.gguf", folder, extra=extra))
    assert parent.config.pad_token_id is None


def test_a_tokenizer_that_cannot_be_read(tiny_parent, tmp_path: Path, cache: Path) -> None:
    folder = tiny_parent("llama", tokenizer=False)
    extra = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}
    path = write_gguf(tmp_path / "m.gguf", folder, extra=extra)
    with pytest.raises(MolError, match=r"the tokenizer in .*m\.gguf cannot be read"):
        open_parent(path)
    assert not any(each.is_dir() for each in cache.iterdir())


def test_weights_that_are_not_finite_are_refused_by_name(
    tiny_parent, tmp_path: Path, cache: Path
) -> None:
    folder = tiny_parent("llama", tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MolError, match=r"blk\.1\.ffn_up\.weight in .* NaN"):
        open_parent(write_gguf(tmp_path / "m.gguf", folder))
    assert not any(path.is_dir() for path in cache.iterdir())


def test_split_files_are_named_as_such(tiny_parent, tmp_path: Path) -> None:
    extra = {"split.no": 0, "split.count": 3}
    path = tmp_path / "model-00001-of-00003.gguf"
    write_gguf(path, tiny_parent("llama"), extra=extra)
    with pytest.raises(MolError, match="is part 1 of 3 of a split GGUF file"):
        open_parent(path)


def test_damaged_files(tiny_parent, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_parent("llama", tokenizer=False))
    whole = path.read_bytes()
    for data in (b"", b"GGUF", b"not a gguf file at all", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(data)
        with pytest.raises(MolError, match="damaged or not a GGUF file"):
            open_parent(path)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MolError, match="not installed") as error:
        open_parent(tmp_path / "m.gguf")
    assert error.value.hint == "pip install 'molcli[gguf]'"
