"""The figures of a plan match those of the conversion."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from molcli.config.sections import CalibrateConfig, Recipe, TrainConfig, UpcycleConfig
from molcli.errors import MolError
from molcli.estimate.cost import Cost, conversion_cost, parent_config, training_cost
from molcli.estimate.forecast import FORECAST, compute_predictors, layer_spectra
from molcli.estimate.gpus import GPUS
from molcli.estimate.parameters import count_parameters
from molcli.families.parent import open_parent, outline
from molcli.fitting.converted_config import converted_config
from molcli.stages.plan import PRESETS, plan

SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "vocab_size": 49_152,
    "dtype": torch.bfloat16,
}
DENSE = {name: value for name, value in SMOLLM2.items() if name != "dtype"}


def test_candidates_have_the_requested_share_and_reproducible_settings() -> None:
    found = plan(SMOLLM2, Recipe(), 0.6, 10**6, GPUS["h100"])
    assert [c.name for c in found.candidates[:3]] == list(PRESETS)
    assert len(found.candidates) == 3 + 3 + 2 + 6
    for candidate in found.candidates:
        config = converted_config(DENSE, UpcycleConfig(**candidate.settings))
        count = count_parameters(config)
        assert (count.total, count.active) == (candidate.total, candidate.active)
        assert candidate.checkpoint == 2 * count.total
        assert candidate.name in PRESETS or 0.57 <= candidate.share <= 0.61
    assert found.parent_total == count_parameters(parent_config(config)).total
    assert found.recommended == found.candidates[3].name
    assert set(found.to_json()["gpu"]) == {"name", "bf16", "fp32", "memory"}


def test_slices_come_first_and_leave_layers_out() -> None:
    found = plan(SMOLLM2, Recipe(), 0.5, 10**6, GPUS["h100"]).candidates
    names = ["8 slices, 6 layers left out", "8 slices", "16 slices, 6 layers left out"]
    assert [c.name for c in found[3:6]] == names
    assert found[3].settings == {"active": 0.5}
    assert found[4].settings == {"active": 0.5, "skipped_layers": "none"}
    assert found[0].settings == {"preset": "quality"} and found[1].settings == {}
    # Attention alone has a quarter of a layer: neurons need room.
    few = plan(SMOLLM2, Recipe(), 0.2, 10**6, GPUS["h100"]).candidates
    assert [c.name for c in few if "slices" in c.name] == [
        "8 slices, 13 layers left out",
        "16 slices, 13 layers left out",
    ]


def test_only_layers_and_mixers_of_the_recipe_matter() -> None:
    few = UpcycleConfig(layers=[0, 1], d_thin=448, d_ff_thin=7, num_heads_thin=1)
    few = replace(few, d_thin_shared=576, d_ff_thin_shared=7, num_heads_shared=9)
    found = plan(SMOLLM2, Recipe(upcycle=few), 0.5, 10**6, GPUS["h100"])
    assert all(c.share > 0.95 for c in found.candidates)
    thin = {c.settings["d_thin"] for c in found.candidates if "d_thin" in c.settings}
    assert thin == {128, 192}


def test_no_room_for_neurons_is_refused() -> None:
    with pytest.raises(MolError, match="no room for neurons"):
        plan(SMOLLM2, Recipe(), 0.02, 10**6, GPUS["h100"])


def test_thin_blocks_have_a_forecast() -> None:
    spectrum = torch.linspace(1, 0, 576, dtype=torch.float64)
    spectra = dict.fromkeys(range(30), spectrum / spectrum.sum())
    found = plan(SMOLLM2, Recipe(), 0.5, 10**6, GPUS["h100"], spectra, 4096)
    for candidate in found.candidates:
        assert (candidate.kl is not None) == ("d_thin" in candidate.settings)
    # The narrower of two that are alike is forecast to lose more.
    kl = {c.name: c.kl for c in found.candidates if c.kl is not None}
    assert kl["1+1of9, 256×704, 192×448"] < kl["1+2of9, 128×976"]


def test_predictors_by_hand() -> None:
    spectra = {i: torch.full((576,), 1 / 576, dtype=torch.float64) for i in (3, 7)}
    alike = converted_config(DENSE, UpcycleConfig(layers=[3, 7], d_thin=192))
    found = compute_predictors(alike, spectra, 8192)
    thin = 192 * (2 * 576 + 2 * 64 * (3 + 1) + 3 * 512)
    whole = 576 * (2 * 64 * (9 + 3) + 3 * 1536)
    assert found.layers == 2
    assert found.lost_reading == pytest.approx(1 - 192 / 576)
    assert found.weights == pytest.approx(3 * thin / whole)
    assert found.shared_heads == pytest.approx(3 / 9)
    assert found.tokens_a_feature == pytest.approx(8192 / (3 * 64 + 512))
    assert found.clones == pytest.approx((1 + 2 * 4) / 3)

    split = converted_config(DENSE, UpcycleConfig(blocks="thin", layers=[3]))  # 256 wide and 192
    found = compute_predictors(split, spectra, 8192)
    wide = 256 * (2 * 576 + 2 * 64 * (9 + 3) + 3 * 784)
    thin = 192 * (2 * 576 + 2 * 64 * (1 + 1) + 3 * 496)
    assert found.weights == pytest.approx((wide + thin) / whole)
    lost = (wide * (1 - 256 / 576) + thin * (1 - 192 / 576)) / (wide + thin)
    assert found.lost_reading == pytest.approx(lost)
    features = (wide * (9 * 64 + 784) + thin * (64 + 496)) / (wide + thin)
    assert found.tokens_a_feature == pytest.approx(8192 / features)
    assert found.clones == pytest.approx((wide + 8 * thin) / (wide + thin))
    assert found.shared_heads == 1


@pytest.mark.parametrize(
    "blocks", [{"num_blocks": 1, "top_k": 0}, {"num_shared_blocks": 0, "top_k": 2}]
)
def test_forecast_without_routed_or_shared_blocks(blocks: dict[str, Any]) -> None:
    config = converted_config(DENSE, UpcycleConfig(blocks="thin", layers=[3], **blocks))
    spectra = {3: torch.full((576,), 1 / 576, dtype=torch.float64)}
    assert FORECAST.kl(compute_predictors(config, spectra, 8192)) > 0


def test_spectra_depend_on_weights_and_moments(tiny_parent: Callable[..., Path]) -> None:
    parent = open_parent(tiny_parent("qwen3"))
    eye = torch.eye(64, dtype=torch.float64)
    spectra = dict(layer_spectra(parent, lambda layer: eye, [0, 1]))
    for spectrum in spectra.values():
        assert spectrum.shape == (64,) and spectrum.sum().item() == pytest.approx(1)
        assert (spectrum.diff() <= 0).all()
    # Inputs in one direction only are read from that direction only.
    one = torch.zeros(64, 64, dtype=torch.float64)
    one[5, 5] = 1
    assert dict(layer_spectra(parent, lambda layer: one, [1]))[1][0] > 0.999


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_an_outline_has_the_numbers_of_the_opened_parent(
    family: str, tiny_parent: Callable[..., Path]
) -> None:
    folder = tiny_parent(family, dtype=torch.bfloat16)
    opened = open_parent(folder).mol_config_kwargs()
    (folder / "model.safetensors").unlink()
    found = outline(folder)
    assert found.pop("dtype") == torch.bfloat16
    assert found == opened


def test_costs_grow_with_tokens_layers_and_widths() -> None:
    gpu, config = GPUS["h100"], converted_config(DENSE, UpcycleConfig(d_thin=192))

    def conversion(tokens: int) -> Cost:
        return conversion_cost(config, tokens, 0, gpu)

    one, two, three = (conversion(n * 10**5) for n in (1, 2, 3))  # more than a chunk
    assert three.seconds - two.seconds == pytest.approx(two.seconds - one.seconds)
    assert three.memory - two.memory == pytest.approx(two.memory - one.memory)
    train = TrainConfig()
    whole = training_cost(config, train, 10**6, gpu)
    assert training_cost(config, train, 3 * 10**6, gpu).seconds == pytest.approx(3 * whole.seconds)
    less = training_cost(config, replace(train, gradient_checkpointing=True), 10**6, gpu)
    assert less.memory < whole.memory and less.seconds > whole.seconds
    # Weights, gradients and AdamW's moments are there in any case.
    assert whole.memory > 16 * count_parameters(config).total
    few = converted_config(DENSE, UpcycleConfig(layers=[0], d_thin=192))
    assert conversion_cost(few, 10**5, 0, gpu).seconds < one.seconds
    wide = converted_config(
        DENSE, UpcycleConfig(d_thin=192, d_thin_shared=576, d_ff_thin_shared=1536)
    )
    for cost in (conversion_cost(wide, 10**5, 0, gpu), training_cost(wide, train, 10**6, gpu)):
        equal = one if cost.memory < whole.memory / 2 else whole
        assert cost.seconds > equal.seconds and cost.memory > equal.memory


def test_calibrated_tokens_override_the_recipe() -> None:
    about = CalibrateConfig(tokens=10**7)
    spectra = dict.fromkeys(range(30), torch.full((576,), 1 / 576, dtype=torch.float64))
    few = plan(SMOLLM2, Recipe(calibrate=about), 0.5, 1, GPUS["h100"], spectra, 1000)
    many = plan(SMOLLM2, Recipe(calibrate=about), 0.5, 1, GPUS["h100"])
    assert few.candidates[0].conversion.seconds < many.candidates[0].conversion.seconds
