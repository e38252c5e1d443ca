import torch
from transformers import AutoModelForCausalLM

from molcli.families.parent import open_parent
from molcli.model.parent import load_dense


@torch.no_grad()
def test_a_model_of_dense_layers_is_the_parent(any_parent):
    parent = AutoModelForCausalLM.from_pretrained(any_parent, dtype=torch.float64)
    ours = load_dense(open_parent(any_parent), torch.float64, torch.device("cpu"))
    ids = torch.randint(0, 128, (2, 50))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    single = AutoModelForCausalLM.from_pretrained(any_parent, dtype=torch.float32)
    found, expected, in_float32 = (
        m(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].double()
        for m in (ours, parent, single)
    )
    # transformers takes norms and rotary positions in float32 whatever the model's dtype.
    rounding = (in_float32 - expected).abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * rounding)
