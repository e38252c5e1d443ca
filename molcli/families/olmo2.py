"""OLMo-2: norms behind attention and FFN and none before, queries and keys normalised whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from molcli.errors import MolError
from molcli.families.base import (
    ATTENTION,
    GATED_FFN,
    GGUF_MODULES,
    OUT_BIAS,
    QKV_BIAS,
    Family,
    GgufFormat,
    Stored,
)

_NORMS = {
    "block.mixer_out_norm": Stored("post_attention_layernorm.weight", "d"),
    "block.mlp_out_norm": Stored("post_feedforward_layernorm.weight", "d"),
    "block.mixer.q_norm": Stored("self_attn.q_norm.weight", "q"),
    "block.mixer.k_norm": Stored("self_attn.k_norm.weight", "k"),
}
_GGUF_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class Olmo2(Family):
    """Biases where the config's `attention_bias` says so; released models have none."""

    model_type = "olmo2"
    gguf = GgufFormat("olmo2", GGUF_MODULES | _GGUF_NORMS)

    def layer_tensors(self, config: PreTrainedConfig) -> dict[str, Stored]:
        biases = QKV_BIAS | OUT_BIAS if config.attention_bias else {}
        return _NORMS | ATTENTION | GATED_FFN | biases

    def gguf_config(
        self, path: Path, read: Callable[[str], Any], tensors: set[str]
    ) -> dict[str, Any]:
        if read("attention.sliding_window"):
            raise MolError(
                f"{path} has olmo2.attention.sliding_window: llama.cpp stores OLMo-3 so, which has "
                "sliding windows in most layers",
                allowed="OLMo-2",
                hint="choose an OLMo-2, such as allenai/OLMo-2-0425-1B",
            )
        return super().gguf_config(path, read, tensors)

    def layer_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "pre_norms": False,
            "output_norms": True,
            "qk_norm": True,
            "qk_norm_full_width": True,
        }
