"""The config.json of a parent: read, checked, and refused where MoL cannot express it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from molcli.errors import MolError
from molcli.families import FAMILIES
from molcli.families.base import Family
from molcli.families.config_numbers import check_numbers
from molcli.families.refused import refuse_type
from molcli.families.rotary import INVALID_CONFIG
from molcli.files.json_files import read_object, shortened

_ADAPTER = "adapter_config.json"  # transformers then reads the weights of its base model
# Keys that say nothing about what a model computes, but change how transformers runs it. With an
# attn_implementation such as org/name, it would download code and run it.
CHANGES_THE_RUN = {
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    *("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan"),
    *("output_hidden_states", "output_attentions", "return_dict", "use_return_dict"),
    *("problem_type", "id2label", "label2id", "num_labels", "chunk_size_feed_forward"),
}
# Those, and keys of a parent that make transformers read other files.
_IGNORED = CHANGES_THE_RUN | {
    *("architectures", "auto_map", "configuration_files", "text_config", "_name_or_path"),
    "use_cache",
}


def open_config(folder: Path) -> tuple[PreTrainedConfig, Family]:
    """Read the configuration in a parent's folder.

    Raises:
        MolError: if there is none, it is that of another kind of model, or it has values that no
            model has.
    """
    if (folder / _ADAPTER).is_file():
        raise MolError(
            f"{folder} has an {_ADAPTER}: the model is another one with an adapter",
            allowed="a whole model",
            hint="merge the adapter into its model, or remove the file if it is not in use",
        )
    path = folder / "config.json"
    if not path.is_file():
        raise MolError(
            f"{folder} has no config.json",
            allowed="a folder as save_pretrained writes it",
            hint="give the folder that holds config.json and the safetensors",
        )
    content = read_object(
        path, allowed="the config.json of a model", hint="download it again, with the weights"
    )
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        refuse_type(folder, model_type, FAMILIES)
    check_numbers(content, path)
    try:
        return _made(CONFIG_MAPPING[model_type], content), FAMILIES[model_type]
    except INVALID_CONFIG as error:
        reason = shortened(" ".join(str(error).split()), 200)
        raise MolError(
            f"{path} is not a valid {model_type} config: {reason}",
            allowed="a config.json as save_pretrained writes it",
            hint="use the config.json that was published with the weights",
        ) from error


def _made(kind: Any, content: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a class; raises `INVALID_CONFIG` for values that it does not allow."""
    if content.pop("per_layer_config", None):
        raise ValueError("per_layer_config describes layers of different shapes")
    if "layer_types" not in {field.name for field in fields(kind)}:
        # transformers' caches read the key, the model does not.
        if any(layer != "full_attention" for layer in content.get("layer_types") or ()):
            raise ValueError("layer_types has other layers than full_attention")
        content.pop("layer_types", None)
    config: PreTrainedConfig
    config = kind.from_dict({key: x for key, x in content.items() if key not in _IGNORED})
    # As the model does when it is made. Before that, `original_max_position_embeddings` beside the
    # other rotary parameters is not yet among them.
    config.standardize_rope_params()
    local = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if local and config.sliding_window is None:
        raise ValueError("layer_types has sliding_attention, and sliding_window is null")
    return config


def refuse_variant(config: PreTrainedConfig, family: Family) -> None:
    """Raise MolError for a configuration that MoL cannot express, or that is quantized."""
    family.refuse_variant(config)
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = type(quantization).__name__
    if isinstance(quantization, dict):
        method = str(quantization.get("quant_method", "unnamed method"))
    raise MolError(
        f"the parent's weights are quantized ({method})",
        allowed="weights stored as bfloat16, float16 or float32",
        hint="use the original checkpoint that the quantized one was made from",
    )
