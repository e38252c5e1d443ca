"""One shared block of full width, with all heads and neurons, is the parent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from molcli.config.recipe import RECIPE_FILE, load_recipe
from molcli.config.sections import Recipe, UpcycleConfig
from molcli.families.parent import open_parent
from molcli.stages.upcycle import upcycle

WHOLE = Recipe(upcycle=UpcycleConfig(num_blocks=1, num_shared_blocks=1, d_thin=64))


WHOLE_SHARED = Recipe(
    upcycle=UpcycleConfig(
        num_blocks=1,
        num_shared_blocks=1,
        d_thin=32,
        d_thin_shared=64,
        d_ff_thin_shared=96,
        num_heads_shared=4,
    )
)


@torch.no_grad()
def largest_difference(ours: Path, parent: Path, dtype: torch.dtype = torch.float32) -> float:
    """Between the logits of the two, on a batch with padding at the left."""
    ids = torch.randint(0, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    a, b = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        .eval()(ids, attention_mask=mask)
        .logits[mask.bool()]
        for folder in (ours, parent)
    )
    assert b.std() > 0.1  # there is something to get wrong
    return (a - b).abs().max().item()


@pytest.mark.parametrize("recipe", [WHOLE, WHOLE_SHARED], ids=["thin", "shared"])
def test_the_logits_are_the_parents(tmp_path: Path, any_parent: Path, recipe: Recipe) -> None:
    upcycle(open_parent(any_parent), None, recipe, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "mol"
    assert (model.config.num_blocks, model.config.num_shared_blocks) == (1, 1)
    assert model.config.layer_labels == ["mixture, attention"] * 2
    assert largest_difference(tmp_path / "out", any_parent) < 1e-4


def test_some_layers_can_be_kept(tmp_path: Path, tiny_parent: Callable[..., Path]) -> None:
    folder = tiny_parent("llama")
    options = UpcycleConfig(num_blocks=1, num_shared_blocks=1, d_thin=64, layers=[1])
    upcycle(open_parent(folder), None, Recipe(upcycle=options), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.layer_structures == ["dense", "mixture"]
    assert largest_difference(tmp_path / "out", folder) < 1e-4


def test_a_bf16_parent_stays_bf16(tmp_path: Path, tiny_parent: Callable[..., Path]) -> None:
    folder = tiny_parent("qwen3", dtype=torch.bfloat16)
    upcycle(open_parent(folder), None, WHOLE, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert largest_difference(tmp_path / "out", folder, torch.float32) < 1e-4


def test_the_folder_holds_all_that_belongs_to_a_model(
    tmp_path: Path, tiny_parent: Callable[..., Path]
) -> None:
    folder = tiny_parent("llama")
    upcycle(open_parent(folder), None, WHOLE, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "receipt.json"}
    assert load_recipe(tmp_path / "out" / RECIPE_FILE) == WHOLE
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "out", folder))
    text = "the quick brown fox"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_with_a_calibration_the_receipt_says_that_nothing_is_lost(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    receipt = convert(tiny_parent("mistral"), num_blocks=1, top_k=0, d_thin=64).receipt
    heldout = receipt["heldout"]
    assert heldout["kl"] == pytest.approx(0, abs=1e-6)
    assert heldout["ce"] == pytest.approx(heldout["parent_ce"], abs=1e-5)
    for layer in receipt["layers"]:
        assert layer["retained_energy"] == [1.0]
        assert layer["delta_error"] < 1e-9
