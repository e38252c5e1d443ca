"""Code that comes with a parent never runs, and nothing asks whether it may."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import molcli
from molcli.data.tokenizer import find_tokenizer
from molcli.errors import MolError
from molcli.families.parent import open_parent, outline

SETTINGS: dict[str, Any] = {"sample.tokens": 16, "sample.length": 8}


class Refusing(io.StringIO):
    """An answer that must not be read."""

    def readline(self, size: int | None = -1) -> str:
        pytest.fail("something asks on the terminal")


@pytest.fixture
def hostile(tiny_parent: Callable[..., Path], tmp_path: Path, monkeypatch) -> Path:
    """A parent that brings code for its configuration, model, tokenizer and generation."""
    monkeypatch.setattr(sys, "stdin", Refusing("y\n" * 10))
    folder = tiny_parent("llama")
    program = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (folder / name).write_text(program)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        program + "def generate(model, **kwargs):\n    raise AssertionError\n"
    )
    classes = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    change(folder / "config.json", auto_map=classes)
    change(folder / "generation_config.json", custom_generate="custom_generate")
    return folder


def change(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(found | values))


def own_tokenizer(folder: Path, kind: str | None) -> None:
    classes = ["tokenization_own.OwnTokenizer", "tokenization_own.OwnTokenizer"]
    change(
        folder / "tokenizer_config.json",
        tokenizer_class=kind or "OwnTokenizer",
        auto_map={"AutoTokenizer": classes},
    )


def test_a_parent_with_code_is_read_without_it(hostile: Path, tmp_path: Path) -> None:
    assert open_parent(hostile).config.num_hidden_layers == 2
    assert outline(hostile)["num_hidden_layers"] == 2
    molcli.sample(hostile, tmp_path / "text.jsonl", settings=SETTINGS, progress=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", [None, "PreTrainedTokenizerFast"])
def test_a_tokenizer_with_code(hostile: Path, tmp_path: Path, kind: str | None) -> None:
    own_tokenizer(hostile, kind)
    for read in (open_parent, lambda folder: find_tokenizer(str(folder))):
        if kind is None:  # there is no other class to read it with
            with pytest.raises(MolError, match=r"the tokenizer in .* cannot be read"):
                read(hostile)
        else:
            read(hostile)
    assert not (tmp_path / "ran").exists()


def test_a_type_that_only_its_code_knows(hostile: Path, tmp_path: Path) -> None:
    change(hostile / "config.json", model_type="own")
    for read in (open_parent, outline):
        with pytest.raises(MolError, match="is a model of type 'own'"):
            read(hostile)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_is_refused(hostile: Path) -> None:
    change(hostile / "adapter_config.json", base_model_name_or_path="other/model")
    with pytest.raises(MolError, match=r"has an adapter_config\.json"):
        open_parent(hostile)
