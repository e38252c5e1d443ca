"""Why parents of other types are refused, and how to go on."""

from collections.abc import Iterable
from typing import NoReturn

from molcli.errors import MolError

_EXPERTS = "is a mixture of experts, not one dense FFN a layer"
# model type -> what MoL blocks lack for it.
_LACKING = {
    "gpt2": "has LayerNorms with biases, learned positions, and an FFN without a gate",
    "gpt_neox": "has LayerNorms with biases, and attention and FFN side by side",
    "phi": "has LayerNorms with biases, and attention and FFN side by side",
    "gemma": "has norms that multiply by 1 + weight, and embeddings scaled by sqrt(hidden_size)",
    "gemma2": "has norms behind attention and FFN besides those before, and soft caps on "
    "attention scores and logits",
    "gemma3": "has an image encoder beside the text model",
    "olmo": "has LayerNorms without weights",
    "olmo3": "has the norms of OLMo-2, and sliding windows in most layers but rotary scaling in "
    "the others alone",
    "mixtral": _EXPERTS,
    "olmoe": _EXPERTS,
    "phimoe": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
}
_OTHER_PARENT = {
    "gemma3": "choose a Gemma 3 of text alone (type gemma3_text), such as google/gemma-3-1b-it",
    "mixtral": "choose a dense parent of the same series, such as mistralai/Mistral-7B-v0.3",
    "olmoe": "choose a dense parent of the same series, such as allenai/OLMo-2-0425-1B",
    "phimoe": "choose a dense parent of the same series, such as microsoft/Phi-4-mini-instruct",
    "qwen2_moe": "choose a dense parent of the same series, such as Qwen/Qwen2.5-0.5B",
    "qwen3_moe": "choose a dense parent of the same series, such as Qwen/Qwen3-0.6B",
}


def refuse_type(model: object, model_type: object, allowed: Iterable[str]) -> NoReturn:
    """Raise MolError for a parent of another family, with the reason where the type is known.

    Args:
        model: the model, as the user should see it.
        model_type: as its config.json or GGUF metadata names it.
        allowed: the types that are accepted there.
    """
    reason = _LACKING.get(str(model_type))
    raise MolError(
        f"{model} is a model of type {model_type!r}" + (f", which {reason}" if reason else ""),
        allowed=f"dense decoders of type {', '.join(allowed)}",
        hint=_OTHER_PARENT.get(str(model_type), "choose a parent of one of these families"),
    )
