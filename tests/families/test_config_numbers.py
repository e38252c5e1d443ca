"""Configurations with impossible numbers are refused at once, before anything is made from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molcli.errors import MolError
from molcli.families.parent import open_parent, outline

HUGE = 2**31
NAN, INFINITE = "NaN", "Infinity"  # as JSON files of Python have them
WRONG: list[tuple[str, object]] = [
    *((key, value) for key in ("num_hidden_layers", "num_attention_heads") for value in (
        HUGE, 0, -1, True, "2", None, 2.5, [2], {}, 10**400)),
    *((key, HUGE) for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")),
    *((key, 0) for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", -2),
    ("head_dim", 15),
    ("max_position_embeddings", 0),
    ("max_position_embeddings", 1e9),
    ("rms_norm_eps", -1.0),
    ("rms_norm_eps", "small"),
    ("initializer_range", [0.02]),
    ("bos_token_id", 128),
    ("eos_token_id", [2, 5000]),
    ("eos_token_id", "end"),
    ("pad_token_id", -5),
    ("hidden_act", "magic"),
    ("hidden_act", "xielu"),  # has weights of its own
    ("hidden_act", 3),
    ("rope_parameters", {"rope_type": "default", "rope_theta": -1}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": {"a": {"b": {"c": {"d": 1}}}}}),
]  # fmt: skip
SLIDING: list[tuple[str, object]] = [
    ("sliding_window", 0),
    ("sliding_window", -4),
    ("layer_types", ["full_attention"] * 3),
    ("layer_types", ["full_attention", "chunked_attention"]),
    ("layer_types", "full_attention"),
    ("layer_types", [[]]),
    ("max_window_layers", -1),
]


def edit_config(folder: Path, key: str, value: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


@pytest.mark.parametrize(("family", "key", "value"), [
    *(("llama", *case) for case in WRONG),
    *(("qwen2", *case) for case in SLIDING),
    *(("gemma3_text", *case) for case in SLIDING[:-1]),
    ("gemma3_text", "query_pre_attn_scalar", 0),
    ("llama", "is_causal", False),
    ("llama", "layer_types", ["full_attention", "sliding_attention"]),
    ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),  # without a window
    ("llama", "per_layer_config", {"0": {"intermediate_size": 48}}),
])  # fmt: skip
def test_impossible_numbers_are_refused(
    tiny_parent: Callable[..., Path], family: str, key: str, value: object
) -> None:
    folder = tiny_parent(family, tokenizer=False)
    edit_config(folder, key, value)
    for read in (open_parent, outline):
        with pytest.raises(MolError, match=key):
            read(folder)


@pytest.mark.parametrize("number", [NAN, INFINITE, "1e999"])
def test_numbers_that_are_not_finite_are_refused(
    tiny_parent: Callable[..., Path], number: str
) -> None:
    folder = tiny_parent("llama", tokenizer=False)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', f'"rms_norm_eps": {number}'))
    assert number in path.read_text()
    with pytest.raises(MolError, match=r"not a number|rms_norm_eps"):
        open_parent(folder)


@pytest.mark.parametrize("content", ["", "[]", "null", "[" * 100_000, "\xff", '{"model_type": []}'])
def test_files_that_are_no_configuration(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(MolError, match=r"config\.json|of type"):
        open_parent(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pad_token_id", -1),  # old Llama configurations
        ("pad_token_id", None),
        ("eos_token_id", [2, 3]),
        ("num_key_value_heads", 2),
        ("sliding_window", None),
        ("hidden_act", "gelu"),
        ("rope_theta", None),
        ("layer_types", ["full_attention"] * 2),
        # Keys that do not change what the model computes.
        ("attn_implementation", "kernels-community/other"),
        ("text_config", {"hidden_size": 1}),
        ("configuration_files", ["config.9.0.0.json"]),
        ("return_dict", False),
    ],
)
def test_valid_values_pass(tiny_parent: Callable[..., Path], key: str, value: Any) -> None:
    folder = tiny_parent("llama", tokenizer=False)
    edit_config(folder, key, value)
    assert open_parent(folder).config.num_hidden_layers == 2
