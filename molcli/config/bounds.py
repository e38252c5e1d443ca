"""Types of numbers with a range, for the fields of a recipe's sections."""

from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from molcli.errors import MolError


@dataclass(frozen=True)
class AtLeast:
    """A number from `lowest`."""

    lowest: float

    def holds(self, value: float) -> bool:
        return value >= self.lowest

    def __str__(self) -> str:
        return f"{self.lowest} or more"


@dataclass(frozen=True)
class Above:
    """A number beyond `limit`."""

    limit: float

    def holds(self, value: float) -> bool:
        return value > self.limit

    def __str__(self) -> str:
        return f"more than {self.limit}"


@dataclass(frozen=True)
class Between:
    """A number from `lowest` to `highest`, both included."""

    lowest: float
    highest: float

    def holds(self, value: float) -> bool:
        return self.lowest <= value <= self.highest

    def __str__(self) -> str:
        return f"{self.lowest} to {self.highest}"


Bound = AtLeast | Above | Between
Count = Annotated[int, AtLeast(1)]
Natural = Annotated[int, AtLeast(0)]
Length = Annotated[int, AtLeast(2)]
"""Of a sequence: with fewer tokens, there is nothing to predict."""
Fraction = Annotated[float, Between(0, 1)]
Positive = Annotated[float, Above(0)]
NonNegative = Annotated[float, AtLeast(0)]


def check(name: str, value: float, bound: Bound) -> None:
    """Raise MolError if the value, called `name` by the user, is out of range."""
    if not bound.holds(value):
        raise MolError(f"`{name}` is {value}", allowed=str(bound))


def check_fields(name: str, values: Any, kind: Any) -> None:
    """Raise MolError for the first number out of the range that its field's type states.

    Args:
        name: What the user calls the section, such as "train" or "train.stages.0".
        values: A section.
        kind: The dataclass whose fields are checked, as far as `values` has them.
    """
    for key, hint in get_type_hints(kind, include_extras=True).items():
        value = getattr(values, key, None)
        if not isinstance(value, int | float):  # null, or a word such as auto
            continue
        for alternative in (hint, *get_args(hint)):
            for bound in getattr(alternative, "__metadata__", ()):
                check(f"{name}.{key}", value, bound)
