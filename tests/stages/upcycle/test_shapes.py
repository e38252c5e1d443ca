"""The shapes, kinds of layers and mixers that a recipe can set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from molcli.estimate.parameters import count_parameters
from molcli.families.parent import open_parent

GRID = [  # num_blocks, num_shared_blocks, top_k, d_thin
    (5, 1, 2, 32),
    (5, 0, 3, 32),  # no shared block; groups of 2, 2 and 1 clones
    (15, 1, 3, 16),  # groups of 5, 5 and 4 clones
    (5, 0, 5, 16),  # every routed block on every token
    (4, 2, 1, 32),  # two shared blocks
    (2, 2, 0, 32),  # nothing routed
    (1, 1, 0, 48),  # one block, and not the parent's layer: heads that do not fill KV groups
    (3, 1, 1, 64),  # full width, and yet a mixture
]


@pytest.mark.parametrize(
    "num_blocks, shared, top_k, d_thin, mixer",
    [(*shape, "none") for shape in GRID] + [(*shape, "all") for shape in GRID[:3]],
)
def test_every_shape_fits_and_generates(
    num_blocks: int,
    shared: int,
    top_k: int,
    d_thin: int,
    mixer: str,
    tiny_parent: Callable[..., Path],
    convert: Callable[..., Any],
) -> None:
    converted = convert(
        tiny_parent("llama"),
        tokens=2048,
        num_blocks=num_blocks,
        num_shared_blocks=shared,
        top_k=top_k,
        d_thin=d_thin,
        gated_deltanet=mixer,
    )
    model = converted.model()
    assert model.num_parameters() == count_parameters(model.config).total
    layer = model.model.layers[0]
    assert (layer.shared.thin_in.shape[0] if shared else layer.shared) == (shared or None)
    if num_blocks > shared:
        assert layer.routed.thin_in.shape == (num_blocks - shared, d_thin, 64)
        assert hasattr(layer.routed.block.mixer, "A_log") == (mixer == "all")
    else:
        assert layer.routed is layer.router is None
    ids = torch.arange(5, 45)[None]
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, 43)
    # 1 is the error of a layer that adds nothing. Later layers also inherit earlier errors.
    assert converted.receipt["layers"][0]["delta_error"] < 1


@pytest.mark.parametrize("method, error", [("fitted", 1e-8), ("svd", 1)])
def test_a_shared_block_of_the_parents_shape_is_fitted_exactly(
    method: str, error: float, tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    """By a fit. A projection also divides heads and neurons between shared and routed blocks; a
    layer that adds nothing would have an error of 1."""
    whole = {"d_thin_shared": 64, "d_ff_thin_shared": 96, "num_heads_shared": 4}
    routed = {"num_blocks": 3, "top_k": 1, "d_thin": 16, "d_ff_thin": 8, "num_heads_thin": 1}
    parent = tiny_parent("llama", num_hidden_layers=1)
    converted = convert(parent, tokens=2048, method=method, ridge=1e-6, **whole, **routed)
    model = converted.model()
    assert model.num_parameters() == count_parameters(model.config).total
    layer = model.model.layers[0]
    assert layer.shared.thin_in.shape == (1, 64, 64) and layer.routed.thin_in.shape == (2, 16, 64)
    assert layer.shared.block.mixer.q_proj.shape[1] == 4 * layer.routed.block.mixer.q_proj.shape[1]
    assert converted.receipt["layers"][0]["delta_error"] < error
    ids = torch.arange(5, 45)[None]
    one, two = (
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, **how)
        for how in ({"use_cache": False}, {"cache_implementation": "static"})
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    "head_dim, options, d_thin",
    [
        (16, {"num_blocks": 9, "top_k": None}, 16),  # 1 + 2: a third of 64, in heads of 16
        (16, {"num_blocks": 3, "num_shared_blocks": 2, "top_k": None}, 16),
        (16, {"num_blocks": 2, "top_k": 1}, 32),
        (24, {"num_blocks": 2, "top_k": 1}, 24),
        (24, {"num_blocks": 1, "top_k": 0}, 48),  # the nearest multiple, 72, is past the width
    ],
)
def test_the_default_width_of_equal_blocks_is_d_model_over_the_active_blocks(
    head_dim: int,
    options: dict[str, Any],
    d_thin: int,
    tiny_parent: Callable[..., Path],
    convert: Callable[..., Any],
) -> None:
    parent = tiny_parent("qwen3", head_dim=head_dim, num_hidden_layers=1)
    equal = {"d_thin": None, "d_ff_thin": 24, "blocks": "thin"}
    config = convert(parent, **options | equal).model().config
    assert (config.d_thin, config.d_ff_thin) == (d_thin, 24)
    assert config.num_blocks_per_tok == min(2, config.num_routed_blocks)
    assert config.num_heads_thin == round(4 * d_thin / 64)


def test_a_preset_alone_gives_shared_blocks_another_shape(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    parent = tiny_parent("llama", intermediate_size=512, num_hidden_layers=2)
    converted = convert(parent, preset="quality", d_thin=None, blocks="thin", tokens=2048)
    model = converted.model()
    shared, routed = model.config.shared_spec(), model.config.routed_spec("attention")
    assert shared.num_heads == model.config.num_attention_heads > routed.num_heads
    assert model(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_layers_that_are_kept_are_the_parents_bits(
    family: str, tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    folder = tiny_parent(family, num_hidden_layers=3)
    converted = convert(folder, layers=[1], d_thin=32)
    assert converted.model().config.layer_structures == ["dense", "mixture", "dense"]
    parent, found = open_parent(folder), converted.tensors
    for i in (0, 2):
        for name, tensor in parent.dense_layer(i).items():
            assert torch.equal(found.pop(f"model.layers.{i}.{name}"), tensor)
    assert torch.equal(found.pop("model.embed_tokens.weight"), parent.embedding())
    assert torch.equal(found.pop("model.norm.weight"), parent.final_norm())
    head = parent.lm_head()
    assert head is None or torch.equal(found.pop("lm_head.weight"), head)
    assert all(name.startswith("model.layers.1.") for name in found)
    before, _, after = converted.receipt["layers"]
    assert before["delta_error"] == before["residual_error"] == 0
    assert "retained_energy" not in before
    assert after["residual_error"] > 0  # includes the error of layer 1


@pytest.mark.parametrize(
    "layers, deltanet, labels",
    [
        ("all", "all", ["mixture, gated_deltanet"] * 3),
        ("all", "none", ["mixture, attention"] * 3),
        (
            "all",
            [0, 2],
            ["mixture, gated_deltanet", "mixture, attention", "mixture, gated_deltanet"],
        ),
        ([0, 1], "all", ["mixture, gated_deltanet", "mixture, gated_deltanet", "dense, attention"]),
        ([1, 2], [2], ["dense, attention", "mixture, attention", "mixture, gated_deltanet"]),
        ("all", "every:2", ["mixture, attention", "mixture, gated_deltanet", "mixture, attention"]),
        ([0, 2], "every:2", ["mixture, attention", "dense, attention", "mixture, gated_deltanet"]),
    ],
)
def test_the_mixers_are_those_of_the_recipe(
    layers: Any,
    deltanet: Any,
    labels: list[str],
    tiny_parent: Callable[..., Path],
    convert: Callable[..., Any],
) -> None:
    folder = tiny_parent("llama", num_hidden_layers=3)
    converted = convert(folder, layers=layers, gated_deltanet=deltanet)
    assert converted.model().config.layer_labels == labels
    assert [row["kind"] for row in converted.receipt["layers"]] == labels


@pytest.mark.parametrize("budget, mixer", [(0.0, "none"), (1.0, "all")])
def test_auto_with_a_budget_of_all_or_no_layers(
    budget: float, mixer: str, tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    """The same bits as with that mixer for all layers: measuring changes no weight."""
    folder = tiny_parent("llama")
    auto = convert(folder, gated_deltanet="auto", gated_deltanet_budget=budget)
    alone = convert(folder, gated_deltanet=mixer)
    assert auto.weights == alone.weights
    assert auto.model().config.layer_labels == alone.model().config.layer_labels


def test_auto_chooses_the_cheapest_layers_for_gated_deltanet(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    folder = tiny_parent("llama", num_hidden_layers=4)
    converted = convert(folder, gated_deltanet="auto", layers=[0, 1, 3])
    rows = converted.receipt["layers"]
    assert "gated_deltanet_kl" not in rows[2]
    costs = {row["layer"]: row["gated_deltanet_kl"] for row in rows if row["layer"] != 2}
    chosen = {row["layer"] for row in rows if row["kind"].endswith("gated_deltanet")}
    assert len(chosen) == 2  # half of three, rounded
    assert max(costs[i] for i in chosen) < min(costs[i] for i in costs.keys() - chosen)


def test_auto_converts_the_cheapest_layers(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    """The same bits as with a list of these layers. every:N counts the converted layers."""
    folder = tiny_parent("llama", num_hidden_layers=4)
    auto = convert(folder, layers="auto", gated_deltanet="every:2", d_thin=32)
    rows = auto.receipt["layers"]
    costs = {row["layer"]: row["alone_kl"] for row in rows}
    chosen = sorted(row["layer"] for row in rows if row["kind"].startswith("mixture"))
    assert chosen == sorted(sorted(costs, key=costs.__getitem__)[:2])
    assert [rows[i]["kind"] for i in chosen] == ["mixture, attention", "mixture, gated_deltanet"]
    named = convert(folder, layers=chosen, gated_deltanet="every:2", d_thin=32)
    assert auto.weights == named.weights
    assert auto.model().config.layer_labels == named.model().config.layer_labels


def test_auto_can_convert_no_layer(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    auto = convert(tiny_parent("llama"), layers="auto", layers_budget=0.0)
    assert set(auto.model().config.layer_structures) == {"dense"}


def groups(routed: int, top_k: int) -> list[int]:
    """The group of each routed block: adjacent ones, the first groups larger by the remainder."""
    sizes = [routed // top_k + (i < routed % top_k) for i in range(top_k)]
    return [i for i, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize("num_blocks, top_k", [(7, 2), (7, 3), (3, 2)])
@torch.no_grad()
def test_a_token_visits_one_clone_of_every_group(
    num_blocks: int, top_k: int, tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    """The clones of its cluster, with equal weights."""
    converted = convert(tiny_parent("llama"), num_blocks=num_blocks, top_k=top_k, d_thin=16)
    model, group = converted.model(), torch.tensor(groups(num_blocks - 1, top_k))
    clones = (num_blocks - 1) // top_k
    for routing in model(torch.randint(3, 120, (4, 32))).routing:
        visited = group[routing.blocks].sort(-1).values
        assert torch.equal(visited, torch.arange(top_k).expand_as(visited))
        cluster = routing.blocks % clones
        assert torch.equal(cluster, cluster[:, :1].expand_as(cluster))
        torch.testing.assert_close(routing.weights, torch.full_like(routing.weights, 1 / top_k))


@torch.no_grad()
def test_groups_of_uneven_size_are_still_all_visited(
    tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    """Clones of 5, 5 and 4: tokens of a cluster without a clone visit another cluster's."""
    converted = convert(tiny_parent("llama"), num_blocks=15, top_k=3, d_thin=16)
    model, group = converted.model(), torch.tensor(groups(14, 3))
    for routing in model(torch.randint(3, 120, (8, 32))).routing:
        visited = group[routing.blocks].sort(-1).values
        every = (visited == torch.arange(3)).all(-1).float().mean()
        assert every > 0.97  # but for tokens between two clusters


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (2, 1), (3, 3), (4, 2)])
def test_heads_are_independent_of_the_width(
    heads: int, kv_heads: int, tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    """Of a parent with 4 query heads on 2 key-value heads; null takes 2 at half the width."""
    parent = tiny_parent("llama", num_hidden_layers=1)
    converted = convert(parent, num_heads_thin=heads, gated_deltanet="none")
    config = converted.model().config
    assert (config.num_heads_thin, config.num_kv_heads_thin) == (heads, kv_heads)
    assert converted.tensors["model.layers.0.shared.block.mixer.q_proj"].shape == (
        1,
        heads * 16,
        32,
    )
    assert converted.receipt["layers"][0]["delta_error"] < 1


@pytest.mark.parametrize("preset", ["quality", "fast"])
def test_a_preset_converts_a_parent_too_small_for_it(
    preset: str, tiny_parent: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    parent = tiny_parent("qwen3", num_hidden_layers=1)
    converted = convert(parent, tokens=2048, preset=preset, d_thin=None)
    assert converted.receipt["layers"][0]["delta_error"] < 1
