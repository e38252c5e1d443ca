"""Open a Mixture of Layers checkpoint, or say what is wrong with it."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME

from molcli.errors import MolError
from molcli.families.config_file import CHANGES_THE_RUN
from molcli.families.rotary import INVALID_CONFIG, rotary_embedding
from molcli.files.finite import cast, check_finite
from molcli.files.generation_config import generation_config, read_generation
from molcli.files.json_files import read_object, shortened
from molcli.files.tensors import TensorReader, writing_error
from molcli.model.config_types import check_values
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
        MolError: if the folder holds no Mixture of Layers checkpoint, or its configuration has
            values that no model has.
    """
    content = check_model_type(folder)
    path = folder / "config.json"
    check_values(content, path)
    try:
        config = MoLConfig.from_dict(
            {key: value for key, value in content.items() if key not in CHANGES_THE_RUN}
        )
        rotary_embedding(config)
    except INVALID_CONFIG as error:
        reason = shortened(" ".join(f"{type(error).__name__}: {error}".split()), 200)
        raise MolError(
            f"{path} is not a valid configuration of a Mixture of Layers model ({reason})",
            allowed="a config.json that molcli wrote",
            hint="use the config.json that was written with the weights",
        ) from error
    return config


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
        model.generation_config = generation_config(read_generation(folder, config))
    return model


def _tensors(folder: Path, config: MoLConfig, device: torch.device) -> dict[str, Tensor]:
    reader = TensorReader(folder)
    dtype = torch.float32 if device.type == "cpu" else config.dtype
    assert not isinstance(dtype, str)
    _check_layers(reader, config)
    tensors = {}
    for name in reader.tensors:
        tensor = reader.read(name)
        as_stored = tensor.dtype if dtype is None else stored_dtype(name, dtype)
        check_finite(name, tensor, folder)
        tensors[name] = cast(name, tensor, as_stored).to(device)
    return tensors


def _check_layers(reader: TensorReader, config: MoLConfig) -> None:
    """Raise MolError if the weights have other layers than the configuration.

    A model with very many layers takes long to make, even without weights.
    """
    matches = (re.match(r"model\.layers\.(\d+)\.", name) for name in reader.tensors)
    found = {int(match[1][:9]) for match in matches if match is not None}
    layers = range(config.num_hidden_layers)
    if found != {layer for layer in layers if not config.is_skipped(layer)}:
        raise MolError(
            f"{reader.folder} has weights of {len(found)} layers, but its config.json says "
            f"num_hidden_layers: {config.num_hidden_layers}"
            + (", some of them skipped" if "skipped" in config.layer_structures else ""),
            allowed="a complete folder that molcli wrote",
        )


def check_model_type(folder: Path) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        MolError: if the folder holds no Mixture of Layers model.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise MolError(
            f"{folder} holds no checkpoint: {config.name} is missing",
            allowed="a folder that `molcli upcycle`, `train` or `init` wrote",
        )
    content = read_object(
        config, allowed="a config.json that molcli wrote", hint="copy it from the original folder"
    )
    if (found := content.get("model_type")) != "mol":
        raise MolError(
            f"{folder} holds a model of type {shortened(found)}",
            allowed="a Mixture of Layers model (type mol)",
            hint=f"molcli upcycle {folder} OUT",
        )
    return content


def save_checkpoint(model: MoLForCausalLM, folder: Path) -> None:
    """Write configuration and weights, as `save_pretrained`, with the permissions of any new file.

    Raises:
        OSError: If the disk is full, or the folder cannot be written.
    """
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise writing_error(error, folder) from error
    mode = (folder / "config.json").stat().st_mode & 0o777
    for shard in folder.glob("*.safetensors"):  # which safetensors makes private to the user
        shard.chmod(mode)
