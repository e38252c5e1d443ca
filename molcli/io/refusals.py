"""Why a dense parent cannot become a Mixture of Layers model, in words."""

from collections.abc import Iterable
from typing import NoReturn

from transformers import PreTrainedConfig

from molcli.errors import MolError

_EXPERTS = "is a mixture of experts, not one dense FFN a layer"
# model type -> what MoL blocks lack for it. A block normalises what attention and FFN read by
# RMSNorm, turns queries and keys by rotary positions, and has a gated FFN; nothing else.
_LACKING = {
    "gpt2": "has LayerNorms with biases, learned positions, and an FFN without a gate",
    "gpt_neox": "has LayerNorms with biases, and attention and FFN side by side",
    "phi": "has LayerNorms with biases, and attention and FFN side by side",
    "gemma": "has norms that multiply by 1 + weight, and embeddings scaled by sqrt(hidden_size)",
    "gemma2": "has norms behind attention and FFN besides those before, and soft caps on "
    "attention scores and logits",
    "gemma3": "has norms behind attention and FFN besides those before, and another rotary base "
    "in sliding-window layers",
    "olmo": "has LayerNorms without weights",
    "olmo2": "has norms behind attention and FFN in place of those before, and normalises queries "
    "and keys over all heads together",
    "mixtral": _EXPERTS,
    "olmoe": _EXPERTS,
    "phimoe": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
}
_LACKING |= {"gemma3_text": _LACKING["gemma3"], "olmo3": _LACKING["olmo2"]}


def refuse_family(model: object, model_type: object, families: Iterable[str]) -> NoReturn:
    """Raises MolError with the reason where the type is known. model: as the user should see it."""
    reason = _LACKING.get(str(model_type))
    raise MolError(
        f"{model} is a model of type {model_type!r}" + (f", which {reason}" if reason else ""),
        allowed=f"dense decoders of type {', '.join(families)}",
        hint="choose a parent of one of these families",
    )


def refuse_variant(config: PreTrainedConfig) -> None:
    """Raises MolError for variants of a supported family that MoL blocks cannot express."""
    if getattr(config, "mlp_bias", False):
        raise MolError(
            "the parent's config.json has mlp_bias: true, and MoL's FFN carries no bias",
            allowed="mlp_bias: false",
            hint="choose a parent without FFN biases, such as any Llama released by Meta",
        )
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if share != 1.0 and config.model_type != "phi3":
        raise MolError(
            f"the parent's config.json has partial_rotary_factor: {share}, which transformers "
            f"heeds in some {config.model_type} models only",
            allowed="partial_rotary_factor: 1.0, but for phi3",
            hint="remove the key if the model was trained without it",
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        raise MolError(
            f"the parent's weights are quantized ({_quant_method(quantization)})",
            allowed="weights stored as bfloat16, float16 or float32",
            hint="use the original checkpoint that the quantized one was made from",
        )


def _quant_method(quantization: object) -> str:
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "unnamed method"))
    return type(quantization).__name__
