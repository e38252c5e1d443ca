"""Up to which position a parent's attention is reproduced, and its rotary frequencies."""

from dataclasses import dataclass
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
    trained = _longrope_limit(rope)
    if trained is not None and rope.get("factor") is None:
        return rope | {"factor": positions / trained}  # as transformers computes it
    return dict(rope)


def _longrope_limit(rope: dict[str, Any]) -> int | None:
    """Tokens up to which LongRoPE's short factors hold; None without LongRoPE."""
    if rope["rope_type"] != "longrope":
        return None
    return int(rope["original_max_position_embeddings"])
