"""Mistral: Llama without biases, with a sliding window in all layers or in none."""

from transformers import PreTrainedConfig

from molcli.families.base import Family, GgufFormat


class Mistral(Family):
    """Caps the context at the sliding window, if there is one."""

    model_type = "mistral"
    gguf = GgufFormat("mistral")  # llama.cpp calls most Mistral files "llama"

    def has_qkv_bias(self, config: PreTrainedConfig) -> bool:
        return False

    def has_out_bias(self, config: PreTrainedConfig) -> bool:
        return False

    def context_window(self, config: PreTrainedConfig) -> int | None:
        window: int | None = config.sliding_window
        return window
