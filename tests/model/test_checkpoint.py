"""Checkpoints are opened as transformers opens them, only sooner."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from molcli.errors import MolError
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import open_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_model_that_transformers_reads(make_model, tmp_path, tied):
    saved = make_model(tie_word_embeddings=tied, dtype=torch.bfloat16)
    saved.generation_config.temperature, saved.generation_config.do_sample = 0.7, True
    saved.save_pretrained(tmp_path, max_shard_size="100KB")
    found = open_checkpoint(tmp_path, CPU)
    right = MoLForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert found.state_dict().keys() == right.state_dict().keys()
    for name, tensor in right.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
        assert found.state_dict()[name].dtype == tensor.dtype, name
    assert (found.lm_head.weight is found.model.embed_tokens.weight) is tied
    assert found.generation_config.temperature == 0.7
    assert not found.training and all(p.requires_grad for p in found.parameters())
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(found(ids).logits, right.eval()(ids).logits)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_other_tensors_are_refused(make_model, tmp_path, change):
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.router.weight"
    if change == "missing":
        del tensors[name]
    else:
        name = "model.layers.0.router.more"
        tensors[name] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MolError, match=f"missing or unknown tensors: {name}"):
        open_checkpoint(tmp_path, CPU)


def test_another_shape_is_refused(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MolError, match=r"cannot be read: .*model\.norm\.weight"):
        open_checkpoint(tmp_path, CPU)
