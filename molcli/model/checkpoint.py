"""Open a Mixture of Layers checkpoint, or say what is wrong with it."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from molcli.errors import MolError
from molcli.families.rotary import rotary_embedding
from molcli.files.tensors import TensorReader
from molcli.model.configuration_mol import MoLConfig
from molcli.model.mixers import parameter_names
from molcli.model.modeling_mol import MoLForCausalLM

# Tensors of a router that stay in float32, like those that mixers name.
_ROUTER = ("router.weight", "router.correction_bias")


def assemble(
    config: MoLConfig, tensors: dict[str, Tensor], device: torch.device
) -> tuple[MoLForCausalLM, list[str]]:
    """Build a model from its tensors, without initialising any weights.

    Args:
        tensors: by name, all on the device, used as they are; a tied head needs none.

    Returns:
        The model in evaluation mode, and the names of missing or unknown tensors. If there are
        any, the model must not be used.

    Raises:
        RuntimeError: for a tensor of another shape.
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


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tensor is stored in a model of `dtype`."""
    exact = (*parameter_names("float32_parameters"), *_ROUTER)
    return torch.float32 if name.endswith(exact) else dtype


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_config(folder: Path) -> MoLConfig:
    """Open the configuration only.

    Raises:
        MolError: if the folder holds no Mixture of Layers checkpoint.
    """
    check_model_type(folder)
    return MoLConfig.from_pretrained(folder)


def open_checkpoint(folder: Path, device: torch.device) -> MoLForCausalLM:
    """Open the model in evaluation mode: in its stored dtype on a GPU, in float32 on a CPU.

    Raises:
        MolError: if the folder holds no Mixture of Layers checkpoint, or an incomplete one.
    """
    config = open_config(folder)
    try:  # from_pretrained takes two seconds for a model of 700 tensors
        model, wrong = assemble(config, _tensors(folder, config, device), device)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise MolError(
            f"the checkpoint {folder} cannot be read: {' '.join(str(error).split())}",
            allowed="a complete folder that molcli wrote",
        ) from error
    if wrong:
        raise MolError(
            f"the checkpoint {folder} has missing or unknown tensors: {', '.join(wrong[:3])}",
            allowed="a complete folder that molcli wrote",
        )
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _tensors(folder: Path, config: MoLConfig, device: torch.device) -> dict[str, Tensor]:
    reader = TensorReader(folder)
    dtype = torch.float32 if device.type == "cpu" else config.dtype
    assert not isinstance(dtype, str)
    tensors = {}
    for name in reader.tensors:
        tensor = reader.read(name)
        as_stored = tensor.dtype if dtype is None else stored_dtype(name, dtype)
        tensors[name] = tensor.to(device, as_stored)
    return tensors


def check_model_type(folder: Path) -> None:
    """Raise MolError if the folder holds no Mixture of Layers model."""
    config = folder / "config.json"
    if not config.is_file():
        raise MolError(
            f"{folder} holds no checkpoint: {config.name} is missing",
            allowed="a folder that `molcli upcycle`, `train` or `init` wrote",
        )
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise MolError(f"{config} is not a JSON object: {error}") from error
    if found != "mol":
        raise MolError(
            f"{folder} holds a model of type {found}",
            allowed="a Mixture of Layers model (type mol)",
            hint=f"molcli upcycle {folder} OUT",
        )
