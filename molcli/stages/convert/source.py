"""The checkpoint to convert, read layer by layer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from molcli.errors import MolError
from molcli.files.tensors import TensorReader
from molcli.fitting.streams import OutputHead
from molcli.model.checkpoint import check_model_type
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import Layer, new_layer
from molcli.model.modeling_mol import MoLForCausalLM

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Source:
    """A whole Mixture of Layers checkpoint. No method holds more than what it returns."""

    folder: Path
    config: MoLConfig
    reader: TensorReader

    def embedding(self) -> Tensor:
        """(V, d_model), stored dtype."""
        return self.reader.read(EMBEDDING)

    def layer(self, index: int, device: torch.device) -> Layer:
        """Layer `index`, float32, without gradients."""
        with torch.device("meta"):
            layer = new_layer(self.config, index)
        tensors = {
            name: self.reader.read(layer_name(index, name)).to(device, torch.float32)
            for name in layer.state_dict()
        }
        layer.load_state_dict(tensors, strict=True, assign=True)
        return layer.requires_grad_(False).eval()

    def ending(self, device: torch.device) -> OutputHead:
        """Final norm and head, in float32."""
        head = self.reader.read(EMBEDDING if self.config.tie_word_embeddings else HEAD)
        norm = self.reader.read(NORM).to(device, torch.float32)
        return OutputHead(norm, head.to(device, torch.float32), self.config.rms_norm_eps)


def layer_name(index: int, name: str) -> str:
    """What a layer's tensor is called in the checkpoint."""
    return f"model.layers.{index}.{name}"


def open_source(folder: Path) -> Source:
    """Raises MolError if the folder is not a Mixture of Layers checkpoint, or not a whole one."""
    check_model_type(folder)
    try:
        config = MoLConfig.from_pretrained(folder)
        reader = TensorReader(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise MolError(
            f"the checkpoint {folder} cannot be read: {error}",
            allowed="a whole folder that molcli wrote",
        ) from error
    with torch.device("meta"):
        model = MoLForCausalLM(config)
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop(HEAD)
    found = {name: info.shape for name, info in reader.tensors.items()}
    wrong = sorted(name for name, _ in wanted.items() ^ found.items())
    if wrong:
        raise MolError(
            f"the checkpoint {folder} has missing, unknown or ill-shaped tensors: "
            f"{', '.join(wrong[:3])}",
            allowed="a whole folder that molcli wrote",
        )
    return Source(folder, config, reader)
