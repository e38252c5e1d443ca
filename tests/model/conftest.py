from typing import Any

import pytest
import torch

from molcli.model import MoLConfig, MoLForCausalLM

SMALL: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
    num_blocks=7,
    num_shared_blocks=2,
    num_blocks_per_tok=2,
    d_thin=32,
    d_ff_thin=24,
    # Large weights: small differences in what a token sees become large ones in the logits.
    initializer_range=0.2,
    layer_structures=["mixture", "dense", "mixture"],
    layer_mixers=["attention", "attention", "gated_deltanet"],
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)


@pytest.fixture
def make_model():
    """Makes a random small MoL model in evaluation mode."""

    def make(dtype=torch.float32, device="cpu", seed=0, **changes) -> MoLForCausalLM:
        torch.manual_seed(seed)
        config = MoLConfig(**(SMALL | changes))
        model = MoLForCausalLM(config).to(device, dtype).eval()
        model.generation_config.eos_token_id = None  # random models would stop early
        return model

    return make
