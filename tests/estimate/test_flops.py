"""Operations a token, against what torch counts in a forward pass."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from molcli.estimate.flops import count_flops, training_flops
from molcli.estimate.parameters import count_parameters
from molcli.model import MoLConfig, MoLForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "num_blocks": 5,
    "num_shared_blocks": 1,
    "num_blocks_per_tok": 2,
    "d_thin": 16,
    "d_ff_thin": 24,
}

HEAD = 2 * 50 * 32


def layer(kind: str) -> int:
    one = SHAPE | {"num_hidden_layers": 1}
    return count_flops(MoLConfig(layer_kinds=[kind], **one), 64).active - HEAD


@torch.no_grad()
def counted(config: MoLConfig) -> int:
    """Matrix products of a forward pass over one token, but for attention's own and the angles of
    rotary positions, which some releases of transformers compute as a product."""
    model = MoLForCausalLM(config).eval()
    with FlopCounterMode(display=False) as angles:
        model.model.rotary_emb(torch.empty(0), torch.tensor([[0]]))
    with FlopCounterMode(display=False) as counter:
        model(torch.tensor([[3]]), use_cache=False)
    return counter.get_total_flops() - angles.get_total_flops()


@pytest.mark.parametrize("kind", ["dense", "softmax"])
@pytest.mark.parametrize("gated", [True, False])
def test_flops_of_one_token_match_torchs_counter(kind: str, gated: bool) -> None:
    config = MoLConfig(layer_kinds=[kind] * 2, mlp_gated=gated, **SHAPE)
    heads = 4 if kind == "dense" else 3 * 2  # of one layer; three blocks of two run
    attention = 2 * heads * 4 * 8  # its one key is the token itself
    assert counted(config) == count_flops(config, 1).active - attention


def test_flops_of_a_wider_shared_block_match_torchs_counter() -> None:
    wide = dict(d_thin_shared=24, d_ff_thin_shared=8, num_heads_shared=4)
    config = MoLConfig(
        layer_structures=["mixture"] * 2,
        layer_mixers=["attention"] * 2,
        num_kv_heads_shared=2,
        **SHAPE | wide,
    )
    attention = 2 * (4 + 2 * 2) * 4 * 8
    assert counted(config) == count_flops(config, 1).active - attention


def test_a_dense_model_takes_two_flops_per_weight_plus_attention() -> None:
    config = MoLConfig(layer_structures=["dense"] * 2, layer_mixers=["attention"] * 2, **SHAPE)
    norms = 5 * 32
    weights = count_parameters(config).total - norms  # the tied head counts, the look-up does not
    attention = 2 * 4 * 4 * 8 * (101 + 1) / 2
    found = count_flops(config, 101)
    assert found.total == found.active == 2 * weights + attention


@pytest.mark.parametrize("kind", ["softmax", "gated_deltanet"])
def test_inactive_flops_are_those_of_the_other_blocks(kind: str) -> None:
    """Two of four routed blocks: at equal numbers of keys, the rest would cost as much again."""
    config = MoLConfig(layer_kinds=[kind] * 2, **SHAPE)
    every = MoLConfig(layer_kinds=[kind] * 2, **SHAPE | {"num_blocks_per_tok": 4})
    found, densely = count_flops(config, 1), count_flops(every, 1)
    assert densely.total == densely.active == found.total
    none = MoLConfig(layer_kinds=[kind] * 2, **SHAPE | {"num_blocks": 1, "num_blocks_per_tok": 0})
    routers = 2 * 2 * 32 * 4
    rest = count_flops(none, 1).total + routers
    assert found.active - rest == (found.total - rest) / 2


def test_routed_attention_sees_its_own_tokens_and_deltanet_none() -> None:
    softmax, deltanet = (
        [count_flops(MoLConfig(layer_kinds=[kind] * 2, **SHAPE), n).active for n in (1000, 2000)]
        for kind in ("softmax", "gated_deltanet")
    )
    key = 4 * 2 * 8  # two heads of 8 in a thin block
    shared, routed = 1000 / 2 * key, 2 * (1000 * 2 / 4) / 2 * key
    assert softmax[1] - softmax[0] == 2 * (shared + routed)
    assert deltanet[1] - deltanet[0] == 2 * shared
    unrestricted = MoLConfig(
        layer_structures=["mixture"] * 2,
        layer_mixers=["attention"] * 2,
        restrict_attention=False,
        **SHAPE,
    )
    found = count_flops(unrestricted, 1000)
    assert found.total == found.active


def test_training_takes_three_passes_plus_the_parents() -> None:
    config, dense = (MoLConfig(layer_kinds=[kind] * 2, **SHAPE) for kind in ("softmax", "dense"))
    once, parents = count_flops(config, 64).active, count_flops(dense, 64).active
    assert training_flops(config, 64, parent=None) == 3 * once
    assert training_flops(config, 64, parent=None, layerwise=True) == 3 * (once - HEAD)
    both = training_flops(config, 64, parent=dense, recompute=True)
    assert both == 3 * once + (once - HEAD) + parents


def test_frozen_weights_cost_less_and_least_below_the_trained_ones() -> None:
    shape = SHAPE | {"num_hidden_layers": 3}
    config = MoLConfig(
        layer_structures=["dense", "mixture", "dense"],
        layer_mixers=["attention", "attention", "attention"],
        **shape,
    )
    attention = 4 * 4 * 8 * (64 + 1) // 2  # whose two operands both take a gradient
    reached = 2 * (layer("dense") - attention) + 3 * attention
    mol = layer("dense") + 3 * layer("softmax") + reached + 2 * HEAD
    assert training_flops(config, 64, parent=None, trainable="mol") == mol
    again = training_flops(config, 64, parent=None, trainable="mol", recompute=True)
    assert again == mol + layer("softmax") + layer("dense")
    alone = training_flops(config, 64, parent=config, layerwise=True)
    assert alone == 3 * layer("softmax") + count_flops(config, 64).active - HEAD
    every = MoLConfig(layer_structures=["mixture"] * 3, layer_mixers=["attention"] * 3, **shape)
    frozen_head = training_flops(every, 64, parent=None) - HEAD
    assert training_flops(every, 64, parent=None, trainable="mol") == frozen_head
