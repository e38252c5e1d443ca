"""The curve of the KL to the parent over a run, and when it will have come down far enough."""

from typing import Any

from molcli.maths.recovery import tokens_to_recovery

GOALS = (0.5, 0.75, 0.9, 0.95, 0.99)
"""Recoveries, 1 - KL / KL at the start, of which the next one ahead is forecast."""


class RecoveryCurve:
    """The KL of all stages that measure it; tokens count from where the first of them begins."""

    def __init__(self) -> None:
        self._before = 0
        self._tokens: list[float] = []
        self._kl: list[float] = []

    def add(self, line: dict[str, Any]) -> None:
        """line: of the log, in its order."""
        if line["kl"] is not None:
            self._tokens.append(line["tokens"] - self._before)
            self._kl.append(line["kl"])
        elif not self._kl:
            self._before = line["tokens"]

    def words(self) -> str:
        """Such as "50% recovered in 1.2M tokens"; empty where nothing can be forecast."""
        for goal in GOALS:
            left = tokens_to_recovery(self._tokens, self._kl, goal)
            if left is None:
                return ""
            if left > 0:
                return f"{goal:.0%} recovered in {_short(left)} tokens"
        return ""


def _short(count: float) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:.0f}"
