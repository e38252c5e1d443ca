"""Which layers a conversion touches: the syntax, and what it means."""

import re
from typing import Literal, NewType

from molcli.errors import MolError

Every = NewType("Every", str)
"""`every:N`: of N neighbouring layers, the last."""
LayerChoice = Literal["all", "none", "auto"] | Every | list[int]
SYNTAX = "all, none, auto, every:N, or layers such as 0,3,7"


def is_every(text: str) -> bool:
    """Whether the text reads every:N, N from 1."""
    return re.fullmatch(r"every:0*[1-9][0-9]*", text) is not None


def parse_choice(text: str) -> LayerChoice:
    """What a command line says. Raises MolError for anything that is not `SYNTAX`."""
    words: dict[str, LayerChoice] = {"all": "all", "none": "none", "auto": "auto"}
    if text in words:
        return words[text]
    if is_every(text):
        return Every(text)
    if re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        return [int(number) for number in text.split(",")]
    raise MolError(f"the choice of layers is {text!r}", allowed=SYNTAX)


def chosen_layers(choice: LayerChoice, eligible: list[int]) -> set[int]:
    """The layers that a choice names among the eligible ones; every:N counts these. A list is taken
    at its word, and auto, which has yet to be measured, names none."""
    if not isinstance(choice, str):
        return set(choice)
    if choice == "all":
        return set(eligible)
    if is_every(choice):
        step = int(choice.removeprefix("every:"))
        return set(eligible[step - 1 :: step])
    return set()


def refuse_beyond(name: str, layers: list[int], count: int) -> None:
    """Raises MolError if a layer is none of `count`. name: of the recipe's value."""
    beyond = sorted(i for i in layers if i >= count)
    if beyond:
        raise MolError(
            f"`{name}` names layer {beyond[0]}, but the model has {count}",
            allowed=f"layers 0 to {count - 1}",
        )


def cheapest(costs: dict[int, float], share: float) -> set[int]:
    """The layers of `auto`: round(share * len(costs)) of them, those that cost least first."""
    order = sorted(costs, key=lambda layer: (costs[layer], layer))
    return set(order[: round(share * len(costs))])
