"""Conversions into slices: identities, what is refused, and what training keeps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import molcli
from molcli.errors import MolError
from molcli.estimate.parameters import count_parameters

# In place of the fixture's defaults.
THIN = {"d_thin": None, "top_k": None, "blocks": "slices", "preset": "quality"}


@pytest.fixture
def slices(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Converts into slices; options as in `convert`."""
    return lambda parent, **options: convert(parent, **THIN | options)


def test_all_neurons_in_two_slices_are_the_parent(
    any_parent: Path, slices: Callable[..., Any]
) -> None:
    shape = {"num_blocks": 2, "d_ff_thin_shared": 36, "d_ff_thin": 60, "skipped_layers": "none"}
    converted = slices(any_parent, **shape)
    layer = converted.model().model.layers[0]
    assert layer.block.mlp.up_proj.shape[1] == 36 and layer.slices.up_proj.shape[:2] == (1, 60)
    for ids in list(converted.documents("heldout"))[:3]:
        with torch.no_grad():
            wanted = converted.parent_model()(ids).logits
            found = converted.model()(ids).logits
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-3)
    assert converted.receipt["heldout"]["kl"] < 1e-5
    assert converted.receipt["layers"][0]["retained_energy"] == [pytest.approx(1.0)]


def test_attention_and_norms_are_the_parents_bits(
    tiny_parent: Callable[..., Path], slices: Callable[..., Any]
) -> None:
    parent = tiny_parent("qwen3")
    converted = slices(parent, skipped_layers="none")
    own, of_parent = converted.tensors, load_file(parent / "model.safetensors")
    for ours, theirs in (
        ("mixer.q_proj", "self_attn.q_proj"),
        ("mixer.o_proj", "self_attn.o_proj"),
    ):
        found = own[f"model.layers.1.block.{ours}"][0]
        assert torch.equal(found, of_parent[f"model.layers.1.{theirs}.weight"])
    norm = own["model.layers.1.block.post_norm"][0]
    assert torch.equal(norm, of_parent["model.layers.1.post_attention_layernorm.weight"])
    # The neurons, too: every row of a slice is a row of the parent.
    rows = {tuple(row.tolist()) for row in of_parent["model.layers.1.mlp.up_proj.weight"]}
    assert {
        tuple(row.tolist()) for row in own["model.layers.1.slices.up_proj"].flatten(0, 1)
    } < rows


@pytest.mark.parametrize(("preset", "share"), [("quality", 0.75), ("balanced", 0.5)])
def test_presets_have_their_share_of_the_weights(
    preset: str, share: float, tiny_parent: Callable[..., Path], slices: Callable[..., Any]
) -> None:
    parent = tiny_parent("llama", num_hidden_layers=5, intermediate_size=512)
    converted = slices(parent, preset=preset, num_blocks=9)
    config = converted.model().config
    dense = 5 * (64 * 16 * (4 + 2) * 2 + 3 * 64 * 512)
    routers = len(config.converted_layers) * 8 * 64
    found = count_parameters(config)
    active = found.active - found.embedding - routers
    # Neurons come in multiples of 16 in each layer, and norms are not counted.
    assert share - 0.03 < active / dense < share + 0.01
    assert config.layer_structures.count("skipped") == round(0.4 * (1 - share) * 5)


def test_auto_leaves_out_the_layers_that_change_the_residual_least(
    tiny_parent: Callable[..., Path], slices: Callable[..., Any]
) -> None:
    receipt = slices(tiny_parent("llama", num_hidden_layers=6), preset="balanced").receipt
    influence = [layer["influence"] for layer in receipt["layers"]]
    skipped = [layer["layer"] for layer in receipt["layers"] if "skipped" in layer["kind"]]
    assert skipped == [influence.index(min(influence))]
    assert receipt["layers"][skipped[0]]["delta_error"] == 1.0


def test_a_list_of_skipped_layers_is_followed_and_thin_blocks_take_one_too(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    parent = tiny_parent("llama", num_hidden_layers=4)
    converted = convert(parent, skipped_layers=[2])
    assert converted.model().config.layer_structures == ["mixture", "mixture", "skipped", "mixture"]
    assert not any(name.startswith("model.layers.2.") for name in converted.tensors)
    ids = torch.arange(5, 45)[None]
    assert converted.model().generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, 43)


def test_the_refit_is_better_than_the_parents_own_weights(
    tiny_parent: Callable[..., Path], slices: Callable[..., Any]
) -> None:
    parent = tiny_parent("llama")
    refitted, kept = (
        slices(parent, tokens=2048, skipped_layers="none", ridge=ridge).receipt["layers"][0]
        for ridge in (1e-2, 1e9)
    )
    assert refitted["delta_error"] < kept["delta_error"] < 1
    assert refitted["retained_energy"] == kept["retained_energy"]


def test_slices_of_a_cluster_lose_less_than_the_same_neurons_for_all_tokens(
    tiny_parent: Callable[..., Path], slices: Callable[..., Any]
) -> None:
    parent = tiny_parent("llama", intermediate_size=256)
    routed, shared = (
        slices(parent, tokens=2048, skipped_layers="none", num_blocks=count).receipt
        for count in (5, 1)
    )
    first, other = routed["layers"][0], shared["layers"][0]
    assert first["retained_energy"][0] > other["retained_energy"][0]
    assert first["routing"]["dead_blocks"] == [] and other["routing"] is None
    assert routed["parameters"]["active"] - shared["parameters"]["active"] == 2 * 4 * 64  # routers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 2}, "`upcycle.top_k` is 2, `upcycle.blocks` slices"),
        ({"d_thin": 32}, "`upcycle.d_thin` is 32"),
        ({"method": "svd"}, "`upcycle.method` is svd"),
        ({"gated_deltanet": "all"}, "`upcycle.gated_deltanet` is all"),
        ({"layers": "auto"}, "`upcycle.layers` is auto, `upcycle.blocks` slices"),
        ({"d_ff_thin": 97}, "do not fit a layer of 96"),
        ({"skipped_layers": [0, 1]}, "names all 2 layers"),
        ({"skipped_layers": [1], "layers": [0]}, "names layer 1, which `upcycle.layers` keeps"),
        ({"skipped_layers": [7]}, "names layer 7, but the model has 2"),
    ],
)
def test_what_slices_cannot_have_is_refused(
    options: dict[str, Any], message: str, tiny_parent: Callable[..., Path], tmp_path: Path
) -> None:
    settings = [f"upcycle.{key}={value}" for key, value in options.items()]
    out = tmp_path / "out"
    with pytest.raises(MolError, match=message.replace("[", r"\[")) as refused:
        molcli.upcycle(
            tiny_parent("llama"),
            out,
            settings=["upcycle.blocks=slices", "upcycle.preset=quality", *settings],
            progress=False,
        )
    assert refused.value.allowed
    assert not out.exists()


@pytest.mark.parametrize("routers", ["auto", "train"])
def test_training_keeps_the_routers_of_slices_unless_told_otherwise(
    routers: str, tiny_parent: Callable[..., Path], slices: Callable[..., Any], tmp_path: Path
) -> None:
    converted = slices(tiny_parent("llama"), skipped_layers="none")
    text = tmp_path / "train.jsonl"
    ids = torch.randint(3, 120, (64, 32), generator=torch.Generator().manual_seed(5))
    text.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ids))
    settings = [f"train.routers={routers}", "train.context_length=32", "train.balance=bias"]
    out = tmp_path / "trained"
    molcli.train(
        converted.folder,
        out,
        parent=converted.parent,
        data=str(text),
        tokens=2048,
        settings=settings,
        progress=False,
    )
    before, after = converted.tensors, load_file(out / "model.safetensors")
    for name in ("router.weight", "router.correction_bias"):
        same = torch.equal(before[f"model.layers.0.{name}"], after[f"model.layers.0.{name}"])
        assert same == (routers == "auto")
    name = "model.layers.0.slices.down_proj"
    assert not torch.equal(before[name], after[name])


def test_attention_of_a_sliced_layer_becomes_gated_deltanet(
    tiny_parent: Callable[..., Path], slices: Callable[..., Any], tmp_path: Path
) -> None:
    converted = slices(tiny_parent("llama", num_hidden_layers=3), skipped_layers=[2])
    text = tmp_path / "text.jsonl"
    ids = torch.randint(3, 120, (64, 32), generator=torch.Generator().manual_seed(5))
    text.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ids))
    small = ["calibrate.tokens=1024", "calibrate.heldout_tokens=256", "calibrate.context_length=32"]

    def convert_layer(layer: int, out: Path) -> Path:
        return molcli.convert(
            converted.folder,
            out,
            gated_deltanet=[layer],
            data=str(text),
            settings=small,
            progress=False,
        ).folder

    out = convert_layer(1, tmp_path / "deltanet")
    model = molcli.open_model(out)
    labels = ["sliced, attention", "sliced, gated_deltanet", "skipped, attention"]
    assert model.config.layer_labels == labels
    before, after = converted.tensors, load_file(out / "model.safetensors")
    assert torch.equal(
        before["model.layers.1.slices.up_proj"], after["model.layers.1.slices.up_proj"]
    )
    assert model.generate(ids[:1], max_new_tokens=3, min_new_tokens=3).shape == (1, 35)
    with pytest.raises(MolError, match="names layer 2, which is left out of this model"):
        convert_layer(2, tmp_path / "never")
