"""Read the checkpoint to convert, one layer at a time."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from molcli.errors import MolError
from molcli.files.finite import check_all_finite
from molcli.files.tensors import TensorReader
from molcli.fitting.residuals import OutputHead
from molcli.model.checkpoint import open_config
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import Layer, new_layer
from molcli.model.modeling_mol import MoLForCausalLM

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class SourceCheckpoint:
    """A complete Mixture of Layers checkpoint. No method keeps what it returns in memory."""

    folder: Path
    config: MoLConfig
    reader: TensorReader

    def embedding(self) -> Tensor:
        """Return the embedding, (V, d_model), in its stored dtype."""
        return self.reader.read(EMBEDDING)

    def layer(self, index: int, device: torch.device) -> Layer:
        """Return layer `index`, float32, without gradients."""
        with torch.device("meta"):
            layer = new_layer(self.config, index)
        tensors = {
            name: self.reader.read(tensor_name(index, name)).to(device, torch.float32)
            for name in layer.state_dict()
        }
        layer.load_state_dict(tensors, strict=True, assign=True)
        return layer.requires_grad_(False).eval()

    def output_head(self, device: torch.device) -> OutputHead:
        """Return the final norm and the head, in float32."""
        head = self.reader.read(EMBEDDING if self.config.tie_word_embeddings else HEAD)
        norm = self.reader.read(NORM).to(device, torch.float32)
        return OutputHead(norm, head.to(device, torch.float32), self.config.rms_norm_eps)


def tensor_name(index: int, name: str) -> str:
    """Return the name in the checkpoint of a tensor of layer `index`."""
    return f"model.layers.{index}.{name}"


def open_source_checkpoint(folder: Path) -> SourceCheckpoint:
    """Open a checkpoint. Raises MolError if it is not a complete Mixture of Layers model."""
    config = open_config(folder)
    try:
        reader = TensorReader(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise MolError(
            f"the checkpoint {folder} cannot be read: {error}",
            allowed="a complete folder that molcli wrote",
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
            allowed="a complete folder that molcli wrote",
        )
    check_all_finite(reader)
    return SourceCheckpoint(folder, config, reader)
