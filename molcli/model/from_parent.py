"""Dense parents as models of ours: the same function, layer by layer or whole."""

import torch

from molcli.io.parent import Parent
from molcli.model.assemble import assemble
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import DenseLayer
from molcli.model.modeling_mol import MoLForCausalLM


def dense_layer(parent: Parent, config: MoLConfig, index: int, device: torch.device) -> DenseLayer:
    """Layer `index` of the parent, float32, without gradients."""
    with torch.device("meta"):
        layer = DenseLayer(config)
    # Casts where there is room: the host holds the layer as it is stored.
    tensors = {n: x.to(device).to(torch.float32) for n, x in parent.dense_layer(index).items()}
    layer.load_state_dict(tensors, strict=True, assign=True)
    return layer.requires_grad_(False).eval()


def load_dense(parent: Parent, dtype: torch.dtype, device: torch.device) -> MoLForCausalLM:
    """The whole parent as a model whose layers are all dense, for use as a teacher."""
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
    tensors = {name: x.to(device, dtype) for name, x in tensors.items()}
    model, wrong = assemble(config, tensors, device)
    assert not wrong, wrong
    return model.requires_grad_(False)
