"""Gemma 3: norms of 1 + weight, local and global layers, and what of it is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from molcli.errors import MolError
from molcli.families.parent import open_parent
from molcli.model.parent import load_dense

NORMS = {
    "block.input_norm": "input_layernorm",
    "block.mixer_out_norm": "post_attention_layernorm",
    "block.post_norm": "pre_feedforward_layernorm",
    "block.mlp_out_norm": "post_feedforward_layernorm",
    "block.mixer.q_norm": "self_attn.q_norm",
    "block.mixer.k_norm": "self_attn.k_norm",
}
MATRICES = {
    **{f"block.mixer.{p}_proj": f"self_attn.{p}_proj" for p in "qkvo"},
    **{f"block.mlp.{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}
REAL = os.environ.get("MOLCLI_GEMMA3_GGUF")  # gemma-3-270m-q4_k_m.gguf, which may not be shipped


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_tensor_arrives_with_the_one_added_to_norms(tiny_parent) -> None:
    folder = tiny_parent("gemma3_text")
    state = load_file(folder / "model.safetensors")
    parent = open_parent(folder)
    consumed = {"model.embed_tokens.weight", "model.norm.weight"}
    assert torch.equal(parent.final_norm(), 1 + state["model.norm.weight"])
    for i in range(2):
        layer = parent.dense_layer(i)
        assert set(layer) == NORMS.keys() | MATRICES.keys()
        for ours, tensor in layer.items():
            theirs = f"model.layers.{i}.{(NORMS | MATRICES)[ours]}.weight"
            wanted = state[theirs] + 1 if ours in NORMS else state[theirs]
            if ours.endswith("q_norm"):  # heads of 32, scores scaled by 20^-0.5
                wanted = wanted * (32 / 20) ** 0.5
            consumed.add(theirs)
            assert torch.equal(tensor[0], wanted), ours
    assert consumed == set(state)


def test_norms_are_folded_in_float32(tiny_parent) -> None:
    folder = tiny_parent("gemma3_text", dtype=torch.bfloat16)
    state = load_file(folder / "model.safetensors")
    layer = open_parent(folder).dense_layer(0)
    norm = layer["block.input_norm"][0]
    assert torch.equal(norm, 1 + state["model.layers.0.input_layernorm.weight"].float())
    assert layer["block.mixer.q_proj"].dtype == torch.bfloat16


def test_the_configuration_says_what_is_local(tiny_parent) -> None:
    parent = open_parent(tiny_parent("gemma3_text"))
    kwargs = parent.mol_config_kwargs()
    assert kwargs["sliding_windows"] == [16, None]
    assert kwargs["rope_theta_local"] == 1e3
    assert kwargs["rope_parameters"]["rope_theta"] == 1e6
    assert kwargs["embedding_scale"] == 8.0
    assert kwargs["hidden_act"] == "gelu_pytorch_tanh"
    assert kwargs["max_position_embeddings"] == 256
    assert parent.note == ""


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping: 30\.0"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping: 50\.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0},
                }
            },
            r"local layers \(linear\)",
        ),
    ],
)
def test_variants_are_refused(tiny_parent, changes: dict[str, Any], found: str) -> None:
    folder = tiny_parent("gemma3_text")
    edit_config(folder, **changes)
    with pytest.raises(MolError, match=found):
        open_parent(folder)


def test_missing_and_left_over_norms(tiny_parent) -> None:
    folder = tiny_parent("gemma3_text")
    tensors = load_file(folder / "model.safetensors")
    norm = tensors.pop("model.layers.1.post_feedforward_layernorm.weight")
    tensors["model.layers.1.extra_layernorm.weight"] = norm
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MolError) as error:
        open_parent(folder)
    assert "missing: model.layers.1.post_feedforward_layernorm.weight (1 in" in error.value.found
    assert "left over: model.layers.1.extra_layernorm.weight (1 in all)" in error.value.found


def test_the_token_of_images_may_lie_beyond_the_vocabulary(tiny_parent) -> None:
    folder = tiny_parent("gemma3_text")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    edit_config(folder, vocab_size=len(tokenizer))
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"][: len(tokenizer)].clone()
    tensors["model.embed_tokens.weight"] = embedding
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for token, fits in (("<image_soft_token>", True), ("<other>", False)):
        tokenizer.add_tokens([token], special_tokens=True)
        tokenizer.save_pretrained(folder)
        if fits:
            assert len(open_parent(folder).tokenizer()) == len(embedding) + 1
        else:
            with pytest.raises(MolError, match="vocab_size is"):
                open_parent(folder)


@pytest.mark.skipif(REAL is None, reason="MOLCLI_GEMMA3_GGUF does not name the file")
@torch.no_grad()
def test_the_real_model_is_reproduced_beyond_its_window() -> None:
    assert REAL is not None
    path = Path(REAL)
    parent = open_parent(path)
    text = "The force of gravity keeps all of the planets in orbit around the sun. " * 40
    ids = parent.tokenizer()(text, return_tensors="pt").input_ids
    assert ids.shape[1] > 512
    ours = load_dense(parent, torch.float32, torch.device("cpu"))(ids, use_cache=False).logits
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )(ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
