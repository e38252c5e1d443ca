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
    a, b = (m(ids, attention_mask=mask, use_cache=False).logits for m in (ours, parent))
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=1e-5, atol=1e-5)
