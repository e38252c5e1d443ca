"""Qwen3: Llama with an RMSNorm of each query and key head."""

from typing import Any

from transformers import PreTrainedConfig

from molcli.families.base import QK_NORM, Family, GgufFormat, Stored, marked_window


class Qwen3(Family):
    """Caps the context at the sliding window, if a layer has one."""

    model_type = "qwen3"
    gguf = GgufFormat("qwen3")

    def layer_tensors(self, config: PreTrainedConfig) -> dict[str, Stored]:
        return super().layer_tensors(config) | QK_NORM

    def layer_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"qk_norm": True}

    def context_window(self, config: PreTrainedConfig) -> int | None:
        return marked_window(config)
