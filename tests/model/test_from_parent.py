import pytest
import torch
from transformers import AutoModelForCausalLM

from molcli.io.parent import open_parent
from molcli.model.from_parent import load_dense

CASES = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "tie_word_embeddings": False}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
]


@pytest.mark.parametrize("family, config", CASES)
@torch.no_grad()
def test_a_model_of_dense_layers_is_the_parent(tiny_parent, family, config):
    folder = tiny_parent(family, **config)
    parent = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ours = load_dense(open_parent(folder), torch.float64, torch.device("cpu"))
    ids = torch.randint(0, 128, (2, 50))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    a, b = (m(ids, attention_mask=mask, use_cache=False).logits for m in (ours, parent))
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=1e-5, atol=1e-5)
