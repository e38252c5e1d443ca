"""Open a Mixture of Layers checkpoint from a folder, or say what is wrong with it."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from molcli.errors import MolError
from molcli.model.configuration_mol import MoLConfig
from molcli.model.modeling_mol import MoLForCausalLM

KEPT_IN_FP32 = ("A_log", "dt_bias", "router.weight", "router.correction_bias")


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """In which a tensor of a layer is stored, in a model of this dtype."""
    return torch.float32 if name.endswith(KEPT_IN_FP32) else dtype


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_config(folder: Path) -> MoLConfig:
    """The configuration alone. Raises MolError if the folder is no Mixture of Layers checkpoint."""
    check_model_type(folder)
    return MoLConfig.from_pretrained(folder)


def open_checkpoint(folder: Path, device: torch.device) -> MoLForCausalLM:
    """The model, in evaluation mode: as stored on a GPU, in float32 on a CPU.

    Raises MolError if the folder is not a Mixture of Layers checkpoint, or not a whole one.
    """
    check_model_type(folder)
    model: MoLForCausalLM
    report: dict[str, set[str]]
    try:
        # The signature does not say that this keyword makes it a pair.
        model, report = MoLForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32 if device.type == "cpu" else "auto",
            output_loading_info=True,
        )  # type: ignore[misc]
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise MolError(
            f"the checkpoint {folder} cannot be read: {error}",
            allowed="a whole folder that molcli wrote",
        ) from error
    wrong = sorted([*report["missing_keys"], *report["unexpected_keys"]])
    if wrong:
        raise MolError(
            f"the checkpoint {folder} has missing or unknown tensors: {', '.join(wrong[:3])}",
            allowed="a whole folder that molcli wrote",
        )
    # transformers decorates `to`, and the decorator hides its type.
    model.to(device)  # type: ignore[arg-type]
    return model.eval()


def check_model_type(folder: Path) -> None:
    """Raises MolError if the folder holds no Mixture of Layers model."""
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
