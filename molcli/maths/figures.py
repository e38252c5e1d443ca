"""Refuse measured figures that are NaN or infinite: no report states them."""

import math
from collections.abc import Mapping

from torch import Tensor

from molcli.errors import MolError

_ALLOWED = "a model that computes numbers on this text"
_HINT = "use an earlier checkpoint, or weights that are stored as float32"


def check_figures(figures: Mapping[str, float | None]) -> None:
    """Refuse figures that are not finite.

    Args:
        figures: What each is, for the message, such as "the model's cross-entropy"; None counts as
            not measured.

    Raises:
        MolError: If one is NaN or infinite.
    """
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):
            raise MolError(f"{name} is {value}, not a number", allowed=_ALLOWED, hint=_HINT)


def check_activations(name: str, activations: Tensor) -> None:
    """Refuse activations that are not finite. name: what they are, for the message.

    Raises:
        MolError: If one is NaN or infinite.
    """
    if not activations.isfinite().all():
        raise MolError(f"{name} are not finite", allowed=_ALLOWED, hint=_HINT)
