"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from molcli.families.base import Family, GgufFormat, marked_window


class Qwen2(Family):
    """Caps the context at the sliding window, if a layer has one."""

    model_type = "qwen2"
    gguf = GgufFormat("qwen2")

    def has_qkv_bias(self, config: PreTrainedConfig) -> bool:
        return True

    def has_out_bias(self, config: PreTrainedConfig) -> bool:
        return False

    def context_window(self, config: PreTrainedConfig) -> int | None:
        return marked_window(config)

    def gguf_config(
        self, path: Path, read: Callable[[str], Any], tensors: set[str]
    ) -> dict[str, Any]:
        """Nothing: Qwen2 always has the biases, and implies the width of its heads."""
        return {}
