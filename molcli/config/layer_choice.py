"""Which layers a conversion changes: the syntax, and the layers that it selects."""

import re
from typing import Literal, NewType

from molcli.config.shown import shown
from molcli.errors import MolError

Every = NewType("Every", str)
"""`every:N`: the last of N neighbouring layers."""
LayerChoice = Literal["all", "none", "auto"] | Every | list[int]
_NUMBER = "[0-9]{1,9}"  # Python refuses to read one of over 4,300 digits
SYNTAX = "all, none, auto, every:N, or layers such as 0,3,7"


def is_every(text: str) -> bool:
    """Whether the text is every:N with N of 1 or more."""
    return re.fullmatch(rf"every:(?!0+$){_NUMBER}", text) is not None


def parse_choice(text: str) -> LayerChoice:
    """Parse a choice from the command line. Raise MolError if it does not follow `SYNTAX`."""
    words: dict[str, LayerChoice] = {"all": "all", "none": "none", "auto": "auto"}
    if text in words:
        return words[text]
    if is_every(text):
        return Every(text)
    if re.fullmatch(rf"{_NUMBER}(,{_NUMBER})*", text):
        return [int(number) for number in text.split(",")]
    raise MolError(f"the choice of layers is {shown(text)}", allowed=SYNTAX)


def chosen_layers(choice: LayerChoice, eligible: list[int]) -> set[int]:
    """Return the layers that a choice selects.

    Args:
        choice: A list is returned as it is. "auto" selects none: its layers are measured later.
        eligible: Sorted layers that "all" and "every:N" select from.
    """
    if not isinstance(choice, str):
        return set(choice)
    if choice == "all":
        return set(eligible)
    if is_every(choice):
        step = int(choice.removeprefix("every:"))
        return set(eligible[step - 1 :: step])
    return set()


def refuse_beyond(name: str, layers: list[int], count: int) -> None:
    """Raise MolError if a layer is `count` or more. name: key of the recipe that lists `layers`."""
    beyond = sorted(i for i in layers if i >= count)
    if beyond:
        raise MolError(
            f"`{name}` names layer {beyond[0]}, but the model has {count}",
            allowed=f"layers 0 to {count - 1}",
        )


def cheapest(costs: dict[int, float], fraction: float) -> set[int]:
    """Return the layers that `auto` selects: the round(fraction * len(costs)) that cost least."""
    order = sorted(costs, key=lambda layer: (costs[layer], layer))
    return set(order[: round(fraction * len(costs))])
