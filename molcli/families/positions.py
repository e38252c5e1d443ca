"""Up to which position a parent's attention is reproduced, and its rotary frequencies."""

from typing import Any


def context(positions: int, rope: dict[str, Any], window: int | None) -> tuple[int, str]:
    """Positions up to which MoL sees what the parent sees, and a note where that is not all.

    Args:
        positions: the parent's max_position_embeddings.
        rope: transformers' rope_parameters.
        window: the sliding window at which the context is capped, or None.
    """
    trained = _longrope_limit(rope) or positions
    if window is not None and window < min(positions, trained):
        return window, (
            f"The parent attends to the last {window} tokens only. The converted model attends to "
            f"all, so max_position_embeddings becomes {window}: up to there both see the same."
        )
    if trained < positions:
        return trained, (
            f"The parent rotates its heads more slowly in sequences of more than {trained} tokens "
            f"(LongRoPE), and packed rows have no such length. max_position_embeddings becomes "
            f"{trained}: up to there both see the same."
        )
    return positions, ""


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
