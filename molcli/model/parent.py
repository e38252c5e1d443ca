"""Load a dense parent as a model of ours, layer by layer or whole, and generate from it."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.files.finite import cast
from molcli.model.checkpoint import assemble
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import DenseLayer
from molcli.model.modeling_mol import MoLForCausalLM


def dense_layer(parent: Parent, config: MoLConfig, index: int, device: torch.device) -> DenseLayer:
    """Load layer `index` of the parent, float32, without gradients."""
    with torch.device("meta"):
        layer = DenseLayer(config, index=index)
    # Cast on the device: the host holds the layer in its stored dtype only.
    tensors = {n: x.to(device).to(torch.float32) for n, x in parent.dense_layer(index).items()}
    layer.load_state_dict(tensors, strict=True, assign=True)
    return layer.requires_grad_(False).eval()


def load_dense(parent: Parent, dtype: torch.dtype, device: torch.device) -> MoLForCausalLM:
    """Load the whole parent as a model of dense layers, without gradients.

    Raises:
        MolError: if a weight is NaN or infinite, or too large for `dtype`.
    """
    parent.check_weights()
    config = MoLConfig(**parent.mol_config_kwargs())
    tensors = {
        "model.embed_tokens.weight": parent.embedding(),
        "model.norm.weight": parent.final_norm(),
    }
    if (head := parent.lm_head()) is not None:
        tensors["lm_head.weight"] = head
    for i in range(config.num_hidden_layers):
        layer = parent.dense_layer(i)
        tensors |= {f"model.layers.{i}.{name}": x for name, x in layer.items()}
    tensors = {name: cast(name, x, dtype).to(device) for name, x in tensors.items()}
    model, wrong = assemble(config, tensors, device)
    assert not wrong, wrong
    return model.requires_grad_(False)


def open_teacher(parent: Parent, student: MoLForCausalLM, dtype: torch.dtype) -> MoLForCausalLM:
    """Load the parent on the student's device, without gradients.

    Raises:
        MolError: as `check_vocabulary`.
    """
    check_vocabulary(parent, student)
    return load_dense(parent, dtype, student.device)


def check_vocabulary(parent: Parent, student: MoLForCausalLM) -> None:
    """Check that the predictions of parent and student can be compared.

    Raises:
        MolError: if their vocabularies differ.
    """
    found, wanted = parent.config.vocab_size, student.config.vocab_size
    if found != wanted:
        raise MolError(
            f"the parent {parent.name} has a vocabulary of {found}, the model one of {wanted}",
            allowed="the parent that the model was converted from",
        )


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the tokens that end generation, by config and generation config, ascending."""
    return end_tokens_of(model.config, model.generation_config)


def end_tokens_of(*configs: Any) -> list[int]:
    """Return all tokens that end generation by any of these configurations, ascending."""
    found: set[int] = set()
    for eos in (config.eos_token_id for config in configs):
        found.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return sorted(found)


def generate_greedily(
    model: MoLForCausalLM, ids: Tensor, new_tokens: int, ends: list[int]
) -> Tensor:
    """Generate greedily, without the sampling and penalties of the model's generation config.

    Args:
        model: not changed.
        ids: (B, T) int64, without padding.
        new_tokens: the most tokens to generate.
        ends: tokens that end a row, which is then filled with the first of them.

    Returns:
        (B, T + new tokens), the prompts included.
    """
    usual = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
    finally:
        model.generation_config = usual


def continue_greedily(
    model: MoLForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    new_tokens: int,
) -> str:
    """Continue a prompt greedily and return both as text, without special tokens.

    Args:
        prompt: at least one token.
        new_tokens: the most tokens to generate; an end token stops earlier.
    """
    ids = torch.tensor([prompt], device=model.device)
    out = generate_greedily(model, ids, new_tokens, end_tokens(model))
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
