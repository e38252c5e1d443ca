"""Baselines without a fit: their weights, and that measuring them changes no fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from molcli.stages.upcycle import run

WHOLE = {"num_blocks": 1, "top_k": 0, "d_thin": 64}


@pytest.fixture(autouse=True)
def short_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molcli.stages.upcycle.comparison.NEW_TOKENS", 6)


@pytest.mark.parametrize("method", ["svd", "pca"])
@pytest.mark.parametrize(
    "family, config",
    [("llama", {"attention_bias": True}), ("qwen2", {}), ("qwen3", {})],
)
def test_a_projection_at_full_width_is_exact(
    method: str,
    family: str,
    config: dict[str, Any],
    tiny_parent: Callable[..., Path],
    convert: Callable[..., Any],
) -> None:
    converted = convert(tiny_parent(family, **config), method=method, **WHOLE)
    assert converted.receipt["heldout"]["kl"] == pytest.approx(0, abs=1e-5)
    for layer in converted.receipt["layers"]:
        assert layer["retained_energy"] == pytest.approx([1.0])
        assert layer["delta_error"] < 1e-8


@pytest.mark.parametrize("method", ["svd", "pca"])
def test_parts_of_full_width_add_up_to_attention(
    method: str,
    tiny_parent: Callable[..., Path],
    convert: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heads are divided among a shared and routed blocks, and the router's weight is compensated.

    The FFN is set to zero: that of a block does not read the other blocks' heads.
    """
    folder = tiny_parent("llama", num_hidden_layers=1, attention_bias=True)
    real = run.dense_layer

    def without_ffn(*arguments: Any) -> Any:
        layer = real(*arguments)
        layer.block.mlp.down_proj = torch.nn.Parameter(torch.zeros(1, 64, 96), requires_grad=False)
        return layer

    monkeypatch.setattr(run, "dense_layer", without_ffn)
    shape = {"num_blocks": 3, "num_shared_blocks": 1, "top_k": 2, "d_thin": 64}
    row = convert(folder, method=method, **shape).receipt["layers"][0]
    # Three parts of four heads each: every head three times, a third of it in each.
    assert row["delta_error"] < 1e-8
    assert row["norm_ratio"] == pytest.approx(1, abs=1e-4)


def test_random_blocks_are_initialised_as_by_init(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    parent = tiny_parent("llama")
    converted = convert(parent, method="random", gated_deltanet=[1])
    torch.rand(1)  # earlier draws of random numbers change nothing
    assert converted.weights == convert(parent, method="random", gated_deltanet=[1]).weights
    std = converted.model().config.initializer_range
    for name, tensor in converted.tensors.items():
        if name.endswith(("thin_in", "thin_out", "up_proj")):
            assert tensor.std().item() == pytest.approx(std, rel=0.05)
        if name.endswith("input_norm") and ".layers." in name:
            assert (tensor == 1).all()
    # Two layers of the same seed still differ.
    names = [f"model.layers.{i}.shared.thin_in" for i in range(2)]
    assert not torch.equal(*(converted.tensors[name] for name in names))


@pytest.mark.parametrize("method", ["svd", "pca"])
def test_clones_of_a_group_start_equal(
    method: str, tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    tensors = convert(tiny_parent("qwen3"), method=method).tensors  # 1+2of5: clones of two
    for name, tensor in tensors.items():
        if ".routed." in name:
            assert torch.equal(tensor[0], tensor[1]) and torch.equal(tensor[2], tensor[3])
    weight = tensors["model.layers.0.routed.block.mixer.q_proj"]
    assert not torch.equal(weight[0], weight[2])


def test_pca_reads_and_writes_the_principal_axes(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    converted = convert(tiny_parent("llama"), method="pca", num_blocks=1, top_k=0)
    thin_in = converted.tensors["model.layers.0.shared.thin_in"][0].double()
    thin_out = converted.tensors["model.layers.0.shared.thin_out"][0].double()
    torch.testing.assert_close(thin_in @ thin_in.mT, torch.eye(32).double(), atol=1e-6, rtol=0)
    assert torch.equal(thin_out, thin_in.mT)


def test_a_conversion_by_a_baseline_method_is_the_baseline_of_the_full_receipt(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    """A fit does not change a baseline, and measuring baselines does not change a fit."""
    parent = tiny_parent("llama")
    full = convert(parent, receipt="full", gated_deltanet=[1])
    assert full.weights == convert(parent, gated_deltanet=[1]).weights
    for method in ("random", "svd", "pca"):
        start = convert(parent, method=method, gated_deltanet=[1])
        row = full.receipt["baselines"][method]
        assert row["ce"] == pytest.approx(start.receipt["heldout"]["ce"], rel=1e-6)
        assert row["kl"] == pytest.approx(start.receipt["heldout"]["kl"], rel=1e-6)
        assert row["params_active"] == start.receipt["parameters"]["active"]
        assert full.receipt["heldout"]["kl"] < row["kl"]


@pytest.mark.parametrize(
    "num_blocks, shared, top_k, d_thin",
    [(15, 1, 3, 16), (5, 0, 3, 32), (4, 2, 1, 32), (2, 2, 0, 48), (8, 1, 4, 32)],
)
def test_every_shape_can_be_projected(
    num_blocks: int,
    shared: int,
    top_k: int,
    d_thin: int,
    tiny_parent: Callable[..., Path],
    convert: Callable[..., Any],
) -> None:
    """Heads in several parts, groups of uneven size, nothing routed, nothing shared."""
    parent = tiny_parent("llama", num_hidden_layers=1)
    shape = {"num_blocks": num_blocks, "num_shared_blocks": shared, "top_k": top_k}
    receipt = convert(parent, method="svd", d_thin=d_thin, **shape).receipt
    assert receipt["heldout"]["kl"] < 10
    row = receipt["layers"][0]
    # The router's weights are compensated; parts of a truncated layer add up to less than it.
    assert 0.2 < row["norm_ratio"] < 1.2
    assert len(row["retained_energy"]) == shared + top_k
