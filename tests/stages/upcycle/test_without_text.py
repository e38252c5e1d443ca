"""Conversions that need no text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from molcli import api
from molcli.config.sections import Recipe, UpcycleConfig
from molcli.families.parent import open_parent
from molcli.stages.upcycle import upcycle


def convert(parent: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    settings = {"num_blocks": 5, "top_k": 2, "d_thin": 32} | options
    api.upcycle(parent, out, recipe=Recipe(upcycle=UpcycleConfig(**settings)), progress=False)
    return load_file(out / "model.safetensors")


@pytest.fixture(autouse=True)
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where text would be sampled from the parent."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("text was asked for")

    monkeypatch.setattr("molcli.api.conversion.calibrate", refuse)


@pytest.mark.parametrize("method", ["random", "svd"])
def test_blocks_that_are_not_fitted_need_no_text(
    method: str, tmp_path: Path, tiny_parent: Callable[..., Path]
) -> None:
    """Two conversions are equal, and kept layers are the parent's."""
    parent = tiny_parent("llama")
    one = convert(parent, tmp_path / "one", method=method, layers=[1])
    again = convert(parent, tmp_path / "two", method=method, layers=[1])
    assert (tmp_path / "one/model.safetensors").read_bytes() == (
        tmp_path / "two/model.safetensors"
    ).read_bytes()
    assert one.keys() == again.keys()
    kept = open_parent(parent).dense_layer(0)
    assert all(torch.equal(one[f"model.layers.0.{name}"], x) for name, x in kept.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    routing = model.model(torch.arange(3, 60)[None]).routing[0]
    # A token visits one clone of each group of two.
    assert torch.equal((routing.blocks // 2).sort(-1).values.unique(dim=0), torch.tensor([[0, 1]]))


def test_svd_compensates_the_routers_weights(
    tmp_path: Path, tiny_parent: Callable[..., Path]
) -> None:
    """1/2 each, divided by the 2 that are chosen: thin_out is 4 times what the shared block's is,
    where both have the same part of the parent."""
    parent = tiny_parent("llama")
    options: dict[str, Any] = dict(method="svd", d_thin=64, num_heads_thin=4, d_ff_thin=96)
    found = convert(parent, tmp_path / "out", **options)
    shared, routed = (found[f"model.layers.0.{stack}.thin_out"] for stack in ("shared", "routed"))
    for block in routed:
        torch.testing.assert_close(block, 4 * shared[0], rtol=1e-4, atol=1e-5)


def test_a_conversion_of_no_layer_is_the_parent(
    tmp_path: Path, tiny_parent: Callable[..., Path]
) -> None:
    parent = tiny_parent("qwen2", dtype=torch.bfloat16)
    convert(parent, tmp_path / "out", layers=[])
    ids = torch.arange(3, 60)[None]
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        for folder in (tmp_path / "out", parent)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"method": "pca"}, {}, {"method": "svd", "gated_deltanet": "auto"}]
)
def test_other_methods_need_text(
    options: dict[str, Any], tmp_path: Path, tiny_parent: Callable[..., Path]
) -> None:
    with pytest.raises(AssertionError, match="text was asked for"):
        convert(tiny_parent("llama"), tmp_path / "out", **options)


def test_random_blocks_do_not_read_the_parents_layers(
    tmp_path: Path, tiny_parent: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, reads = open_parent(tiny_parent("llama", num_hidden_layers=3)), []
    real = type(parent).dense_layer

    def counted(self: Any, index: int) -> Any:
        reads.append(index)
        return real(self, index)

    monkeypatch.setattr(type(parent), "dense_layer", counted)
    options = UpcycleConfig(method="random", num_blocks=5, d_thin=32, layers=[1])
    upcycle(parent, None, Recipe(upcycle=options), tmp_path / "out")
    assert reads == [0, 2]
