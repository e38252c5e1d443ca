"""Untrained checkpoints: the paper's recipes at full size on the meta device, and small on disk."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from molcli.config.recipe import RECIPE_FILE, bundled_recipes, load_recipe
from molcli.config.sections import Recipe
from molcli.estimate.parameters import count_parameters
from molcli.model import MoLForCausalLM
from molcli.stages.init import init, untrained_config

# Millions of parameters that the paper (arXiv 2605.09516) or the recipe's own comment states.
MILLIONS = {
    "paper-1.3b-1+3of15": 2080,
    "paper-80m-1+2of5": 87.5,
    "paper-80m-1+3of15": 198.2,
    "paper-80m-all-active": 85.3,
    "paper-80m-dense-top3": 85.3,
    "paper-80m-softmax-1+2of15": 190.4,
    "paper-80m-softmax-1+2of5": 85.3,
    "paper-80m-sparse-3of5": 85.3,
}
SHRINK = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, head_dim=8)


def test_the_papers_recipes_are_these() -> None:
    assert {name for name in bundled_recipes() if name.startswith("paper-")} == set(MILLIONS)


@pytest.mark.parametrize("name", MILLIONS)
def test_a_paper_recipe_builds_with_the_papers_parameters(name: str) -> None:
    config = untrained_config(load_recipe(name).model)
    with torch.device("meta"):
        model = MoLForCausalLM(config)
    model.tie_weights()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == count_parameters(config).total
    half_of_the_last_digit = 0.05 if total < 1e9 else 5
    assert total / 1e6 == pytest.approx(MILLIONS[name], abs=half_of_the_last_digit)


@pytest.mark.parametrize("name", MILLIONS)
def test_the_name_says_what_runs(name: str) -> None:
    """1+3of15: one shared block and 3 of the 14 others."""
    config = untrained_config(load_recipe(name).model)
    shape = name.split("-")[-1]
    found = config.num_blocks, config.num_shared_blocks, config.num_blocks_per_tok
    if "of" in shape:
        shared, _, routed = shape.rpartition("of")[0].rpartition("+")
        assert found == (int(shape.rpartition("of")[2]), int(shared or 0), int(routed))
        softmax = "softmax" in name or "sparse" in name
        assert set(config.layer_mixers) == {"attention" if softmax else "gated_deltanet"}
        assert config.restrict_attention
    else:
        top_k, restricted = {"active": (5, True), "top3": (3, False)}[shape]
        assert found == (5, 0, top_k)
        assert config.restrict_attention is restricted


def shrunken(name: str, seed: int = 0) -> Recipe:
    recipe = load_recipe(name)
    small = replace(recipe.model, **SHRINK, d_thin=16, d_ff_thin=24, seed=seed)
    return replace(recipe, model=small)


@pytest.mark.parametrize("name", MILLIONS)
def test_an_untrained_checkpoint_loads_and_generates(name: str, tmp_path: Path) -> None:
    recipe = shrunken(name)
    init(recipe, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is MoLForCausalLM
    assert model.num_parameters() == count_parameters(model.config).total
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    prompt = torch.tensor([[5, 6, 7]])
    out = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert out.shape == (1, 9)
    assert load_recipe(tmp_path / "out" / RECIPE_FILE) == recipe


def test_the_seed_draws_the_weights(tmp_path: Path) -> None:
    one, again, other = (
        weights(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one == again
    assert one != other


def weights(out: Path, seed: int) -> bytes:
    init(shrunken("paper-80m-1+2of5", seed), out)
    return (out / "model.safetensors").read_bytes()
