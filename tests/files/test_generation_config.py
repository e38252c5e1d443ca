"""generation_config.json as it is read: the file first, the config for what it does not say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

from molcli.errors import MolError
from molcli.families.parent import open_parent
from molcli.files.generation_config import read_generation, write_generation

CONFIG = PreTrainedConfig(bos_token_id=1, eos_token_id=2, pad_token_id=None)


@pytest.mark.parametrize("content, expected", [
    (None, {"bos_token_id": 1, "eos_token_id": 2}),
    ({}, {"bos_token_id": 1, "eos_token_id": 2}),
    ({"eos_token_id": [2, 5]}, {"bos_token_id": 1, "eos_token_id": [2, 5]}),
    ({"eos_token_id": None, "top_p": 0.9}, {"bos_token_id": 1, "eos_token_id": 2, "top_p": 0.9}),
    # transformers itself would not write this one again: there is no do_sample beside it.
    ({"temperature": 0.7, "pad_token_id": 0},
     {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.7, "pad_token_id": 0}),
    # Not supported by thin blocks: the model would refuse every call of generate.
    ({"cache_implementation": "hybrid", "penalty_alpha": 0.6, "top_k": 4},
     {"bos_token_id": 1, "eos_token_id": 2, "top_k": 4}),
    ({"cache_implementation": "static"},
     {"bos_token_id": 1, "eos_token_id": 2, "cache_implementation": "static"}),
])  # fmt: skip
def test_the_file_wins_and_the_config_fills_in_tokens(
    tmp_path: Path, content: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    found = read_generation(tmp_path, CONFIG)
    assert found == expected
    write_generation(found, tmp_path)
    assert read_generation(tmp_path, CONFIG) == expected


@pytest.mark.parametrize(
    "content",
    [
        {"eos_token_id": "</s>"},
        {"eos_token_id": [2, 3.5]},
        {"eos_token_id": [2, True]},
        {"eos_token_id": 128},
        {"bos_token_id": [1]},
        {"pad_token_id": -2},
        {"max_new_tokens": -5},
        {"compile_config": 5},
        {"validate": 5},
    ],
)
def test_values_that_no_generation_uses_are_refused_with_the_parent(
    tiny_parent: Callable[..., Path], content: dict[str, Any]
) -> None:
    folder = tiny_parent("llama")
    (folder / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(MolError, match=r"generation_config\.json"):
        open_parent(folder)


def test_what_a_model_does_not_use_is_read_without_a_warning(
    tiny_parent: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_parent("llama")
    content = {"temperature": 0.7, "pad_token_id": -1, "cache_implementation": "x", "mine": 3}
    (folder / "generation_config.json").write_text(json.dumps(content))
    assert open_parent(folder).generation["temperature"] == 0.7
    assert not caplog.records


@pytest.mark.parametrize("text", ["{", "3", "[1, 2]", '"text"'])
def test_a_file_that_is_no_json_object_is_refused_with_the_parent(
    tiny_parent: Callable[..., Path], text: str
) -> None:
    folder = tiny_parent("llama")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(MolError, match="JSON object"):
        open_parent(folder)
