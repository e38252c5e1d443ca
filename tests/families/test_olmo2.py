"""OLMo-2: norms behind attention and FFN alone, queries and keys normalised over all heads."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from molcli.errors import MolError
from molcli.families.parent import open_parent

HF_NAME = {
    "block.mixer_out_norm": "post_attention_layernorm",
    "block.mlp_out_norm": "post_feedforward_layernorm",
    **{f"block.mixer.{p}_norm": f"self_attn.{p}_norm" for p in "qk"},
    **{f"block.mixer.{p}_proj": f"self_attn.{p}_proj" for p in "qkvo"},
    **{f"block.mlp.{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}


def test_every_tensor_arrives_under_our_name(tiny_parent) -> None:
    folder = tiny_parent("olmo2")
    state = load_file(folder / "model.safetensors")
    parent = open_parent(folder)
    consumed = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for i in range(2):
        layer = parent.dense_layer(i)
        assert set(layer) == set(HF_NAME)
        for ours, tensor in layer.items():
            theirs = f"model.layers.{i}.{HF_NAME[ours]}.weight"
            consumed.add(theirs)
            assert torch.equal(tensor[0], state[theirs]), ours
    assert consumed == set(state)
    assert layer["block.mixer.q_norm"].shape == (1, 64)  # 4 heads of 16
    assert layer["block.mixer.k_norm"].shape == (1, 32)
    kwargs = parent.mol_config_kwargs()
    assert (kwargs["pre_norms"], kwargs["output_norms"]) == (False, True)
    assert kwargs["qk_norm"] and kwargs["qk_norm_full_width"]


def test_a_norm_before_attention_is_left_over(tiny_parent) -> None:
    folder = tiny_parent("olmo2")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MolError, match=r"left over: model\.layers\.0\.input_layernorm\.weight"):
        open_parent(folder)
