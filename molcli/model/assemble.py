"""A model from its tensors, without drawing any first."""

import torch
from torch import Tensor

from molcli.model.configuration_mol import MoLConfig
from molcli.model.modeling_mol import MoLForCausalLM
from molcli.model.rotary import rotary_embedding


def assemble(
    config: MoLConfig, tensors: dict[str, Tensor], device: torch.device
) -> tuple[MoLForCausalLM, list[str]]:
    """The model, in evaluation mode, of these tensors as they are, all on the device; a tied head
    needs none. And the names of those that are missing or unknown: with any, it is of no use.

    Raises RuntimeError for a tensor of another shape.
    """
    with torch.device("meta"):
        model = MoLForCausalLM(config)
    embedding = tensors.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and embedding is not None:
        tensors = tensors | {"lm_head.weight": embedding}
    missing, unknown = model.load_state_dict(tensors, strict=False, assign=True)
    model.model.rotary_emb = rotary_embedding(config).to(device)
    model.tie_weights()
    return model.eval(), sorted([*missing, *unknown])
