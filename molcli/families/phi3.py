"""Phi-3 and Phi-4-mini: one matrix for queries, keys and values, one for the FFN's gate and up."""

from transformers import PreTrainedConfig

from molcli.families.base import Family, Stored

_FUSED = {
    "block.mixer.q_proj": Stored("self_attn.qkv_proj.weight", "qd", "qkk", 0),
    "block.mixer.k_proj": Stored("self_attn.qkv_proj.weight", "kd", "qkk", 1),
    "block.mixer.v_proj": Stored("self_attn.qkv_proj.weight", "kd", "qkk", 2),
    "block.mlp.gate_proj": Stored("mlp.gate_up_proj.weight", "fd", "ff", 0),
    "block.mlp.up_proj": Stored("mlp.gate_up_proj.weight", "fd", "ff", 1),
}


class Phi3(Family):
    """No biases. Caps the context at the sliding window and at LongRoPE's second frequencies."""

    model_type = "phi3"
    allows_partial_rotary = True

    def layer_tensors(self, config: PreTrainedConfig) -> dict[str, Stored]:
        return super().layer_tensors(config) | _FUSED

    def has_qkv_bias(self, config: PreTrainedConfig) -> bool:
        return False

    def has_out_bias(self, config: PreTrainedConfig) -> bool:
        return False

    def context_window(self, config: PreTrainedConfig) -> int | None:
        window: int | None = config.sliding_window
        return window
