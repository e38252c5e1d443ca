"""Numbers of a config.json, checked before anything is made from them.

transformers makes lists of `num_hidden_layers` entries while it reads a configuration, so that a
number such as 2^31 would fill the memory.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN

from molcli.errors import MolError
from molcli.files.json_files import shortened

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_POSITIONS = 2**31
# Whole numbers: the smallest and the largest, far above those of any model.
WHOLE = {
    "vocab_size": (1, 2**26),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**24),
    "num_hidden_layers": (1, 4096),
    "num_attention_heads": (1, 2**16),
    "num_key_value_heads": (1, 2**16),
    "head_dim": (1, 2**16),
    "max_position_embeddings": (1, _POSITIONS),
    "original_max_position_embeddings": (1, _POSITIONS),
    "sliding_window": (1, _POSITIONS),
    "max_window_layers": (0, _POSITIONS),
    # Of a Mixture of Layers model.
    "num_blocks": (1, 2**16),
    "num_shared_blocks": (0, 2**16),
    "num_blocks_per_tok": (0, 2**16),
    **{f"d_{part}{of}": (1, 2**24) for part in ("thin", "ff_thin") for of in ("", "_shared")},
    **{f"num_{part}heads_{of}": (1, 2**16) for part in ("", "kv_") for of in ("thin", "shared")},
}
# Keys that may be null: what they stand for then follows from others.
_OPTIONAL = {
    *("num_key_value_heads", "head_dim", "original_max_position_embeddings", "sliding_window"),
    *("max_window_layers", "partial_rotary_factor", "rope_theta", "rope_local_base_freq"),
    *("num_heads_thin", "num_kv_heads_thin", "num_heads_shared", "num_kv_heads_shared"),
    *("d_thin_shared", "d_ff_thin_shared", "rope_theta_local"),
}
# Numbers that need not be whole.
_REAL = {
    "rms_norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 1e6),
    "partial_rotary_factor": (1e-6, 1.0),
    "query_pre_attn_scalar": (1e-6, 1e9),
    "embedding_scale": (1e-9, 1e9),
    "rope_theta": (1e-6, 1e30),
    "rope_theta_local": (1e-6, 1e30),
    "rope_local_base_freq": (1e-6, 1e30),
}
_ROPE = ("rope_parameters", "rope_scaling")
_ROPE_MAY_BE_ZERO = ("mscale", "mscale_all_dim", "attention_factor")
_LAYER_TYPES = ("full_attention", "sliding_attention")


def check_numbers(config: Mapping[str, Any], source: Path, *, fewest_layers: int = 1) -> None:
    """Check the numbers of a configuration as it was read from JSON.

    Missing keys are allowed; their defaults are checked against the weights.

    Args:
        config: the content of config.json.
        source: the file, for messages.
        fewest_layers: smallest num_hidden_layers.

    Raises:
        MolError: for a number that no model has, or a value of another type.
    """

    def refuse(key: str, value: object, allowed: str) -> MolError:
        return MolError(
            f"{source} has {key}: {shortened(value)}",
            allowed=allowed,
            hint="use the config.json that was published with the weights",
        )

    for key, (low, high) in (*WHOLE.items(), *_REAL.items()):
        value: Any = config.get(key)
        if key not in config or (value is None and key in _OPTIONAL):
            continue
        whole = key in WHOLE
        low = fewest_layers if key == "num_hidden_layers" else low
        if not _is_number(value, whole=whole) or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            raise refuse(key, value, f"{kind} from {low} to {high}")
    for key in _TOKENS:
        ids, vocabulary = config.get(key), config.get("vocab_size", math.inf)
        for token in ids if isinstance(ids, list) and key == "eos_token_id" else [ids]:
            # Old configurations have pad_token_id: -1 for none.
            if token is not None and not (
                _is_number(token, whole=True) and -1 <= token < vocabulary
            ):
                raise refuse(key, ids, "tokens of the vocabulary, or null")
    for key in _ROPE:
        found = _wrong_rope(config.get(key), key)
        if found is not None:
            raise refuse(*found, "a mapping whose numbers are positive")
    for key in ("hidden_act", "hidden_activation"):
        if config.get(key) is not None and not _is_activation(config[key]):
            raise refuse(key, config[key], "an activation that transformers knows, such as silu")
    _check_layer_types(config, refuse)
    heads = config.get("num_attention_heads", 0)
    shared = config.get("num_key_value_heads") or heads
    if shared and heads % shared:
        raise refuse("num_key_value_heads", shared, f"a divisor of num_attention_heads, {heads}")
    width = config.get("head_dim")
    if width is not None and width % 2:
        raise refuse("head_dim", width, "an even number: rotary embeddings turn pairs of channels")


def _check_layer_types(config: Mapping[str, Any], refuse: Any) -> None:
    kinds = config.get("layer_types")
    if kinds is None:
        return
    count = config.get("num_hidden_layers")
    fits = isinstance(kinds, list) and len(kinds) == (count or len(kinds))
    if not fits or any(kind not in _LAYER_TYPES for kind in kinds):
        raise refuse("layer_types", kinds, f"one of {', '.join(_LAYER_TYPES)} for each layer")


def _is_number(value: object, *, whole: bool = False) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return whole or abs(value) < 1e300  # comparing larger ones with a float overflows
    return not whole and isinstance(value, float) and math.isfinite(value)


def _is_activation(name: object) -> bool:
    """Whether MoL can apply it: one without weights of its own."""
    if not isinstance(name, str) or name not in ACT2FN:
        return False
    return not any(True for _ in ACT2FN[name].parameters())


def _wrong_rope(value: Any, key: str) -> tuple[str, Any] | None:
    """The first value of a description of rotary embeddings that cannot be meant, with its key."""
    if value is None or isinstance(value, str) or key.endswith(".truncate"):
        return None
    if isinstance(value, dict | list):
        if key.count(".") > 2:  # of a kind of layer, of a list, of an entry: no deeper
            return key, value
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        found = (_wrong_rope(each, f"{key}.{name}") for name, each in inner)
        return next((each for each in found if each is not None), None)
    low = 0 if key.rsplit(".", 1)[-1] in _ROPE_MAY_BE_ZERO else 1e-9
    return None if _is_number(value) and low <= value else (key, value)
