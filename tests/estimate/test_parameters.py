"""Parameter counts against the paper, and against the model itself on the meta device."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molcli.estimate.parameters import count_parameters
from molcli.model import MoLConfig, MoLForCausalLM

KINDS = ("dense", "dense_gated_deltanet", "softmax", "gated_deltanet")
SCALE_80M = {
    "mlp_gated": False,
    "attention_bias": True,
    "attention_out_bias": True,
}
SCALE_1B = SCALE_80M | {
    "vocab_size": 50_257,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "d_thin": 512,
    "d_ff_thin": 2048,
}


def config(kind: str, blocks: tuple[int, int, int], **settings: Any) -> MoLConfig:
    """blocks: all, shared, and routed per token."""
    names = ("num_blocks", "num_shared_blocks", "num_blocks_per_tok")
    settings = SCALE_80M | settings
    return MoLConfig(
        layer_kinds=[kind] * settings.get("num_hidden_layers", 8),
        **dict(zip(names, blocks, strict=True)),
        **settings,
    )


@pytest.mark.parametrize(
    ("kind", "blocks", "scale", "millions"),
    [
        ("gated_deltanet", (15, 1, 3), {}, 198.2),
        ("gated_deltanet", (5, 1, 2), {}, 87.5),
        ("softmax", (5, 1, 2), {}, 85.3),
        ("softmax", (15, 1, 2), {}, 190.4),
        ("gated_deltanet", (15, 1, 3), SCALE_1B, 2080),
    ],
)
def test_totals_match_the_paper(
    kind: str, blocks: tuple[int, int, int], scale: dict[str, Any], millions: float
) -> None:
    total = count_parameters(config(kind, blocks, **scale)).total
    half_of_the_last_digit = 0.05 if millions < 1000 else 5
    assert total / 1e6 == pytest.approx(millions, abs=half_of_the_last_digit)


def test_active_parameters_of_the_large_model_match_the_paper() -> None:
    """The paper's 0.61B leaves out what Gated DeltaNet has beyond softmax attention."""
    with_softmax, with_deltanet = (
        count_parameters(config(kind, (15, 1, 3), **SCALE_1B)).active / 1e9
        for kind in ("softmax", "gated_deltanet")
    )
    assert with_softmax == pytest.approx(0.61, abs=0.005)
    assert with_deltanet == pytest.approx(0.627, abs=0.0005)


@settings(deadline=None, max_examples=25)
@given(
    flags=st.fixed_dictionaries(
        {
            name: st.booleans()
            for name in (
                "mlp_gated",
                "attention_bias",
                "attention_out_bias",
                "qk_norm",
                "qk_norm_full_width",
                "pre_norms",
                "output_norms",
                "output_norms_thin",
                "tie_word_embeddings",
            )
        }
    ),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    shared=st.integers(0, 2),
    routed=st.integers(0, 3),
    heads=st.sampled_from([(4, 4), (4, 2)]),
    of_shared=st.sampled_from(
        [
            {},
            {"d_thin_shared": 32},
            {"d_ff_thin_shared": 1},
            {"num_heads_shared": 6, "num_kv_heads_shared": 3},
        ]
    ),
)
def test_total_matches_the_model(
    flags: dict[str, bool],
    kinds: list[str],
    shared: int,
    routed: int,
    heads: tuple[int, int],
    of_shared: dict[str, int],
) -> None:
    numbers = MoLConfig(
        vocab_size=50,
        hidden_size=48,
        num_hidden_layers=len(kinds),
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        intermediate_size=40,
        layer_kinds=kinds,
        num_blocks=shared + routed,
        num_shared_blocks=shared,
        num_blocks_per_tok=min(2, routed),
        d_thin=24,
        d_ff_thin=20,
        num_heads_thin=heads[0],
        num_kv_heads_thin=heads[1],
        **flags,
        **of_shared,
    )
    with torch.device("meta"):
        model = MoLForCausalLM(numbers)
    model.tie_weights()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(numbers).total == total


def test_active_counts_the_routed_blocks_that_run() -> None:
    """One more routed block per token is one block per layer more, and nothing in the total."""
    two, three = (count_parameters(config("softmax", (5, 1, k))) for k in (2, 3))
    every = count_parameters(config("softmax", (5, 1, 4)))
    dense_top_two = count_parameters(config("softmax", (5, 1, 2), restrict_attention=False))
    assert two.total == three.total == every.total == every.active
    assert every.active - three.active == three.active - two.active > 0
    assert dense_top_two.active == every.active
    assert two.embedding == 32_000 * 1024
    assert two.non_embedding == two.total - two.embedding


def test_a_wider_shared_block_counts_in_both() -> None:
    """By hand: width 4 more, 2 neurons fewer, 2 heads more, of 8 + 2 blocks of one layer."""
    numbers = dict(
        vocab_size=50,
        hidden_size=48,
        num_hidden_layers=1,
        head_dim=8,
        layer_structures=["mixture"],
        layer_mixers=["attention"],
        num_blocks=9,
        num_blocks_per_tok=2,
        d_thin=16,
        d_ff_thin=20,
    )
    equal = count_parameters(MoLConfig(**numbers))
    wide = dict(d_thin_shared=20, d_ff_thin_shared=18, num_heads_shared=4)
    wide["num_kv_heads_shared"] = 4
    found = count_parameters(MoLConfig(**numbers, **wide))
    # A row of a block: thin_in and thin_out, q, k, v and o, gate, up and down, two norms.
    rows = 2 * 48 + 4 * 4 * 8 + 3 * 18 + 2, 2 * 48 + 4 * 2 * 8 + 3 * 20 + 2
    assert found.total - equal.total == found.active - equal.active == 20 * rows[0] - 16 * rows[1]
