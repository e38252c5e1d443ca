"""Parents whose layer is not Llama's: norms behind mixer and FFN, windows, norms of all heads."""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

from molcli.config.sections import Recipe, UpcycleConfig
from molcli.errors import MolError
from molcli.families.parent import open_parent
from molcli.stages.upcycle import upcycle

FAMILIES = ["gemma3_text", "olmo2"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_conversion_beats_its_baselines_and_decodes_the_same_with_both_caches(
    family: str, tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    converted = convert(tiny_parent(family), receipt="full")
    receipt = converted.receipt
    assert isfinite(receipt["heldout"]["kl"])
    assert set(receipt["baselines"]) >= {"skipped", "random"}
    assert not {"svd", "pca"} & set(receipt["baselines"])
    for baseline in ("skipped", "random"):
        assert receipt["heldout"]["kl"] < receipt["baselines"][baseline]["kl"]
    model = converted.model()
    assert not any(name.endswith("out_norm") for name in converted.tensors)
    ids = torch.randint(3, 120, (2, 40), generator=torch.Generator().manual_seed(0))
    options = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
    grown = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), grown)
    # What was decoded step by step is what one forward pass predicts.
    predicted = model(grown, use_cache=False).logits.argmax(-1)
    assert (predicted[:, 39:-1] == grown[:, 40:]).float().mean() > 0.9


@pytest.mark.parametrize("method", ["svd", "pca"])
def test_methods_that_project_weights_are_refused(
    method: str, tmp_path: Path, tiny_parent: Callable[..., Path]
) -> None:
    recipe = Recipe(upcycle=UpcycleConfig(method=method))
    with pytest.raises(MolError, match=f"upcycle.method` is {method}, but the parent has norms"):
        upcycle(open_parent(tiny_parent("olmo2")), None, recipe, tmp_path / "out")
