"""Operations against torch's own counter."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from molcli.maths.flops import forward_flops, training_flops
from molcli.model import MoLConfig, MoLForCausalLM


def config(kind: str, **settings: Any) -> MoLConfig:
    shape: dict[str, Any] = dict(
        vocab_size=300,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=256,
        layer_kinds=[kind] * 2,
        num_blocks=5,
        num_shared_blocks=1,
        num_blocks_per_tok=2,
        d_thin=32,
        d_ff_thin=64,
        tie_word_embeddings=False,
    )
    return MoLConfig(**(shape | settings))


@pytest.mark.parametrize("kind", ["dense", "softmax"])
def test_matrices_count_as_in_torch(kind: str) -> None:
    """At a context of 1 attention is next to nothing, and norms are no matrices."""
    c = config(kind)
    model = MoLForCausalLM(c).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.randint(300, (8, 1)), use_cache=False)
    assert forward_flops(c, 1) * 8 == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_attention_grows_with_the_context_and_with_the_share_that_is_routed() -> None:
    dense, thin = config("dense"), config("softmax")
    grown = forward_flops(dense, 200) - forward_flops(dense, 100)
    assert grown == 2 * 4 * 96 * 50
    grown = forward_flops(thin, 200) - forward_flops(thin, 100)
    assert grown == 2 * (4 * 32 * 50 + 4 * 2 * 32 * 50 * 2 / 4)


def test_training_is_three_passes_and_the_parents() -> None:
    c, dense = config("softmax"), config("dense")
    plain = training_flops(c, 64, parent=None)
    assert plain == 3 * forward_flops(c, 64)
    both = training_flops(c, 64, parent=dense, recompute=True)
    assert both == plain + forward_flops(dense, 64) + forward_flops(c, 64, head=False)
