"""The converted model's configuration from the recipe and the parent's, without weights."""

from typing import Any, Literal

import pytest

from molcli.config.layer_choice import cheapest
from molcli.config.recipe import load_recipe
from molcli.config.sections import UpcycleConfig
from molcli.errors import MolError
from molcli.estimate.parameters import count_parameters
from molcli.fitting.converted_config import converted_config
from molcli.model import MoLConfig


def parent(*numbers: int) -> dict[str, Any]:
    names = "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"
    rest = "intermediate_size", "num_hidden_layers", "vocab_size"
    return dict(zip(names + rest, numbers, strict=True))


PARENTS = {
    "SmolLM2-135M": parent(576, 9, 3, 64, 1536, 30, 49_152),
    "Qwen3-0.6B": parent(1024, 16, 8, 128, 3072, 28, 151_936),
    "Llama-3.2-1B": parent(2048, 32, 8, 64, 8192, 16, 128_256),
    "Llama-3.2-3B": parent(3072, 24, 8, 128, 8192, 28, 128_256),
    "Llama-3.1-8B": parent(4096, 32, 8, 128, 14_336, 32, 128_256),
}


def one_shape(name: str, **options: Any) -> UpcycleConfig:
    """Options that set the paper's width: then all blocks have one shape."""
    dense = PARENTS[name]
    width = round(dense["hidden_size"] / 3 / dense["head_dim"]) * dense["head_dim"]
    return UpcycleConfig(d_thin=width, **options)


def active_fraction(dense: dict[str, Any], config: MoLConfig) -> float:
    """Active non-embedding parameters over the parent's."""
    layers = dense["num_hidden_layers"]
    whole = count_parameters(
        MoLConfig(**dense, layer_structures=["dense"] * layers, layer_mixers=["attention"] * layers)
    )
    count = count_parameters(config)
    return (count.active - count.embedding) / whole.non_embedding


@pytest.mark.parametrize("name", PARENTS)
@pytest.mark.parametrize(
    "blocks",
    [
        {},
        {"num_blocks": 15, "top_k": 3},
        {"num_blocks": 10, "num_shared_blocks": 2},
        {"num_shared_blocks": 0, "top_k": 3},
    ],
)
@pytest.mark.parametrize(
    "preset, low, high",
    [("quality", 0.74, 0.755), ("balanced", 0.51, 0.53), ("fast", 0.36, 0.38)],
)
def test_a_preset_is_a_fraction_of_any_parent(
    name: str, blocks: dict[str, int], preset: Any, low: float, high: float
) -> None:
    config = converted_config(PARENTS[name], UpcycleConfig(blocks="thin", preset=preset, **blocks))
    papers = preset == "balanced" and not config.num_shared_blocks
    if not papers:
        assert low <= active_fraction(PARENTS[name], config) <= high


@pytest.mark.parametrize("name", PARENTS)
@pytest.mark.parametrize("preset", ["quality", "balanced", "fast"])
def test_shared_blocks_of_a_preset_hold_all_heads(name: str, preset: Any) -> None:
    config = converted_config(PARENTS[name], UpcycleConfig(blocks="thin", preset=preset))
    shared, routed = config.shared_spec(), config.routed_spec(config.layer_mixers[0])
    assert (shared.num_heads, shared.num_kv_heads) == (
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    assert 1 <= routed.num_heads <= config.num_attention_heads / 6
    assert routed.width <= shared.width and config.num_blocks_per_tok == 1


@pytest.mark.parametrize(
    "name, heads, kv_heads",
    [
        ("SmolLM2-135M", 3, 1),  # in proportion to the width, and a whole group
        ("Qwen3-0.6B", 6, 3),
        ("Llama-3.2-1B", 12, 3),  # 11 in proportion, which would need 11 key-value heads
        ("Llama-3.2-3B", 9, 3),  # 8
        ("Llama-3.1-8B", 12, 3),  # 11
    ],
)
def test_balanced_takes_whole_groups_of_heads_where_that_is_cheaper(
    name: str, heads: int, kv_heads: int
) -> None:
    found = converted_config(PARENTS[name], one_shape(name))
    assert (found.num_heads_thin, found.num_kv_heads_thin) == (heads, kv_heads)


@pytest.mark.parametrize("name", PARENTS)
def test_balanced_follows_the_papers_rule_and_is_between_the_other_presets(name: str) -> None:
    dense = PARENTS[name]
    config = converted_config(dense, one_shape(name))
    assert abs(3 * config.d_thin - dense["hidden_size"]) <= 1.5 * dense["head_dim"]
    assert 0.38 < active_fraction(dense, config) < 0.74


def test_smollm2s_presets() -> None:
    def shape(**options: Any) -> tuple[int, int, int]:
        thin = UpcycleConfig(blocks="thin", **options)
        found = converted_config(PARENTS["SmolLM2-135M"], thin)
        return found.d_thin, found.num_heads_thin, found.d_ff_thin

    assert shape() == (192, 1, 496)
    assert shape(preset="quality") == (256, 1, 560)
    assert shape(preset="fast") == (128, 1, 560)
    assert shape(num_heads_thin=3) == (192, 3, 512)
    assert shape(preset="quality", num_heads_thin=3) == (256, 3, 592)
    assert shape(preset="fast", num_shared_blocks=0, top_k=3) == (128, 3, 592)
    # Options override the preset, which fills the rest.
    assert shape(preset="quality", d_thin=192) == (192, 3, 976)
    assert shape(preset="quality", d_ff_thin=256, num_heads_thin=6) == (256, 6, 256)
    assert shape(d_thin=256) == (256, 4, 683)
    assert shape(d_thin=256, num_heads_thin=3) == (256, 3, 683)


@pytest.mark.parametrize(
    "options, found, hint",
    [
        ({"num_heads_thin": 10}, "num_heads_thin` is 10, but the parent has 9 heads", "thin=3"),
        ({"num_heads_shared": 10}, "num_heads_shared` is 10, but the parent", "heads_shared=3"),
        ({"d_thin_shared": 200}, "`upcycle.d_thin_shared` is 200, but a head is", "shared=192"),
        ({"d_thin_shared": 640}, "d_thin_shared` is 640, but the model's width", "shared=192"),
        ({"preset": "fast", "d_thin": 448}, "no room for neurons", "upcycle.d_thin=128"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_a_hint_that_fits(
    options: dict[str, Any], found: str, hint: str
) -> None:
    with pytest.raises(MolError) as caught:
        converted_config(PARENTS["SmolLM2-135M"], UpcycleConfig(**options))
    assert found in caught.value.found and hint in caught.value.hint
    key, value = caught.value.hint.removeprefix("--set upcycle.").split("=")
    converted_config(PARENTS["SmolLM2-135M"], UpcycleConfig(**options | {key: int(value)}))


def test_shared_blocks_have_the_shape_that_is_set_for_them() -> None:
    """Others are the routed blocks'; if none is set, the preset splits the weights."""

    def shapes(**options: Any) -> list[tuple[int, ...]]:
        thin = UpcycleConfig(blocks="thin", **options)
        config = converted_config(PARENTS["SmolLM2-135M"], thin)
        found = config.shared_spec(), config.routed_spec(config.layer_mixers[0])
        return [(s.width, s.d_ff, s.num_heads, s.num_kv_heads) for s in found]

    routed = (192, 512, 3, 1)
    assert shapes() == [(256, 784, 9, 3), (192, 496, 1, 1)]
    assert shapes(d_thin=192) == [routed, routed]
    assert shapes(d_thin_shared=384) == [(384, 512, 3, 1), routed]
    assert shapes(d_ff_thin_shared=64) == [(192, 64, 3, 1), routed]
    assert shapes(num_heads_shared=9) == [(192, 512, 9, 3), routed]
    assert shapes(num_heads_shared=9, num_heads_thin=1) == [(192, 512, 9, 3), (192, 512, 1, 1)]


SLICED = {"quality": 0.75, "balanced": 0.5, "fast": 0.375}


@pytest.mark.parametrize("name", PARENTS)
@pytest.mark.parametrize("preset", SLICED)
@pytest.mark.parametrize("num_blocks", [9, 1])
def test_a_preset_of_slices_is_a_fraction_of_any_parent(
    name: str, preset: Any, num_blocks: int
) -> None:
    options = UpcycleConfig(preset=preset, num_blocks=num_blocks)
    config = converted_config(PARENTS[name], options)
    layers = PARENTS[name]["num_hidden_layers"]
    assert config.layer_structures.count("skipped") == round(0.4 * (1 - SLICED[preset]) * layers)
    assert config.layer_structures.count("dense") == 0
    found = active_fraction(PARENTS[name], config)
    assert SLICED[preset] - 0.01 <= found <= SLICED[preset] + 0.003  # with routers
    if num_blocks > 1:
        assert config.d_ff_thin == pytest.approx(2 * config.sliced_spec().d_ff, abs=32)


def test_active_replaces_the_fraction_of_a_preset() -> None:
    same, other = (
        converted_config(PARENTS["SmolLM2-135M"], UpcycleConfig(active=active))
        for active in (0.5, 0.6)
    )
    preset = converted_config(PARENTS["SmolLM2-135M"], UpcycleConfig())
    assert same.to_dict() == preset.to_dict()
    assert active_fraction(PARENTS["SmolLM2-135M"], other) == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "paper"},
        {"d_thin": 192},
        {"num_heads_shared": 9},
        {"top_k": 2},
        {"num_shared_blocks": 2},
        {"method": "svd"},
        {"gated_deltanet": "all"},
        {"layers": "auto"},
    ],
)
def test_what_only_thin_blocks_have_makes_them(options: dict[str, Any]) -> None:
    config = converted_config(PARENTS["SmolLM2-135M"], UpcycleConfig(**options))
    assert "mixture" in config.layer_structures and not config.has_slices


def test_the_papers_preset_is_its_form() -> None:
    """1+2of9, and a width of a third of the model's (arXiv 2605.09516)."""
    found = converted_config(PARENTS["SmolLM2-135M"], UpcycleConfig(preset="paper"))
    assert (found.num_blocks, found.num_shared_blocks, found.num_blocks_per_tok) == (9, 1, 2)
    assert (found.d_thin, found.num_heads_thin, found.d_ff_thin) == (192, 3, 512)
    assert found.shared_spec().width == 192


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(MolError) as caught:
        load_recipe(None, ["upcycle.preset=qualty"])
    assert caught.value.hint == "upcycle.preset=quality"


@pytest.mark.parametrize("layers", ["middle", "auto"])
@pytest.mark.parametrize("count, budget", [(30, 0.5), (1, 0.5), (1, 1.0), (4, 0.0), (5, 0.7)])
def test_auto_counts_as_middle_until_it_has_measured(
    layers: Literal["middle", "auto"], count: int, budget: float
) -> None:
    """As many layers, adjacent ones, with as many above them as below, or one fewer."""
    dense = PARENTS["SmolLM2-135M"] | {"num_hidden_layers": count}
    options = UpcycleConfig(blocks="thin", layers=layers, layers_budget=budget)
    config = converted_config(dense, options)
    chosen = [i for i in range(count) if not config.is_dense(i)]
    assert len(chosen) == len(cheapest(dict.fromkeys(range(count), 0.0), budget))
    if chosen:
        assert chosen == list(range(chosen[0], chosen[-1] + 1))
        assert chosen[0] - (count - 1 - chosen[-1]) in (0, 1)
