"""Up to which position a parent's attention is reproduced, and its rotary frequencies."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molcli.errors import MolError


@dataclass(frozen=True)
class ContextLimit:
    """The longest context in which a model of ours computes what the parent computes.

    tokens: the limit. reason: a clause for a message. note: what to tell a user whose parent has
    more positions than that, or "".
    """

    tokens: int
    reason: str
    note: str = ""

    def check(self, length: int, setting: str, *, found: str = "") -> None:
        """Refuse a context that is longer than the limit.

        Args:
            length: tokens of the context.
            setting: the recipe's key that sets it, such as "train.context_length".
            found: for the message, where the length is not the recipe's but that of a folder.

        Raises:
            MolError: if it is longer.
        """
        if length <= self.tokens:
            return
        raise MolError(
            f"{found or f'`{setting}` is {length}'}, but {self.reason}",
            allowed=f"1 to {self.tokens} tokens",
            hint=f"--set {setting}={self.tokens}",
        )


def declared_limit(positions: int, owner: str) -> ContextLimit:
    """The limit that max_position_embeddings sets. owner: "the model" or "the parent"."""
    return ContextLimit(positions, f"{owner} has {positions} positions (max_position_embeddings)")


def context_limit(positions: int, rope: dict[str, Any], window: int | None) -> ContextLimit:
    """Return up to which position MoL sees what the parent sees.

    Args:
        positions: the parent's max_position_embeddings.
        rope: transformers' rope_parameters.
        window: the sliding window at which the context is capped, or None.
    """
    trained = _longrope_limit(rope) or positions
    if window is not None and window < min(positions, trained):
        reason = f"the parent attends to the last {window} tokens only"
        return ContextLimit(
            window,
            f"{reason}, and the converted model to all",
            f"T{reason[1:]}. The converted model attends to "
            f"all, so max_position_embeddings becomes {window}: up to there both see the same.",
        )
    if trained < positions:
        reason = (
            f"the parent rotates its heads more slowly in sequences of more than {trained} tokens "
            "(LongRoPE)"
        )
        return ContextLimit(
            trained,
            f"{reason}, and the converted model does not",
            f"T{reason[1:]}, and packed rows have no such length. max_position_embeddings becomes "
            f"{trained}: up to there both see the same.",
        )
    return declared_limit(positions, "the parent")


def fixed_rope(rope: dict[str, Any], positions: int) -> dict[str, Any]:
    """The rope_parameters, made independent of max_position_embeddings, which may be capped."""
    if rope["rope_type"] in ("longrope", "yarn") and rope.get("factor") is None:
        # As transformers computes it.
        return rope | {"factor": positions / rope["original_max_position_embeddings"]}
    return dict(rope)


def gguf_rope(path: Path, read: Callable[[str], Any], base: float) -> dict[str, Any]:
    """The rope_parameters that a GGUF file describes, as llama.cpp understands it.

    A factor without a type is that of linear scaling.

    Args:
        path: the file, for messages.
        read: returns the file's metadata below the architecture's name; None for none.
        base: where the file names none.

    Raises:
        MolError: for another scaling, which the file describes in part.
    """
    kind = read("rope.scaling.type")
    factor = read("rope.scaling.factor") or read("rope.scale_linear")
    if kind not in (None, "none", "linear") or read("rope.scaling.attn_factor") not in (None, 1.0):
        raise scaled_rope(path)
    found = {"rope_type": "default", "rope_theta": read("rope.freq_base") or base}
    if factor is None or factor in (0, 1) or kind == "none":
        return found
    return found | {"rope_type": "linear", "factor": factor}


def scaled_rope(path: Path) -> MolError:
    """The error for a GGUF file with rotary frequencies that it does not describe fully."""
    return MolError(
        f"{path} scales its rotary frequencies, which GGUF describes only in part",
        allowed="GGUF files with linear RoPE scaling, or with none",
        hint="use the model's safetensors, which describe it in config.json",
    )


def _longrope_limit(rope: dict[str, Any]) -> int | None:
    """Tokens up to which LongRoPE's short factors hold; None without LongRoPE."""
    if rope["rope_type"] != "longrope":
        return None
    return int(rope["original_max_position_embeddings"])
