"""Types of numbers with a range, for the fields of a recipe's sections."""

from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from molcli.config.shown import shown
from molcli.errors import MolError

# What no run reaches, and what arithmetic in int64 and float32 still holds.
MOST_TOKENS = 10**15
MOST_ROWS = 2**16  # of a step: their indices and tokens are in memory
LARGEST_SIZE = 2**31 - 1
LARGEST_SEED = 2**63 - 1
LARGEST_FLOAT = 1e30


@dataclass(frozen=True)
class AtLeast:
    """A number from `lowest` to `highest`, which is beyond all use."""

    lowest: float
    highest: float = LARGEST_FLOAT

    def holds(self, value: float) -> bool:
        return self.lowest <= value <= self.highest

    def allowed(self, value: float) -> str:
        return f"at most {self.highest:,}" if value > self.highest else f"{self.lowest} or more"


@dataclass(frozen=True)
class Above:
    """A number beyond `limit`, up to `LARGEST_FLOAT`, and not so small that its inverse is more."""

    limit: float

    def holds(self, value: float) -> bool:
        return self.limit < value <= LARGEST_FLOAT and value >= 1 / LARGEST_FLOAT

    def allowed(self, value: float) -> str:
        if value > LARGEST_FLOAT:
            return f"at most {LARGEST_FLOAT:.0e}"
        return (
            f"{1 / LARGEST_FLOAT:.0e} or more" if value > self.limit else f"more than {self.limit}"
        )


@dataclass(frozen=True)
class Between:
    """A number from `lowest` to `highest`, both included."""

    lowest: float
    highest: float

    def holds(self, value: float) -> bool:
        return self.lowest <= value <= self.highest

    def allowed(self, value: float) -> str:
        return f"{self.lowest} to {self.highest}"


@dataclass(frozen=True)
class Below:
    """A number from 0 to less than `limit`."""

    limit: float

    def holds(self, value: float) -> bool:
        return 0 <= value < self.limit

    def allowed(self, value: float) -> str:
        return f"0 or more, and less than {self.limit}"


Bound = AtLeast | Above | Between | Below
Count = Annotated[int, AtLeast(1, MOST_TOKENS)]
Natural = Annotated[int, AtLeast(0, MOST_TOKENS)]
Size = Annotated[int, AtLeast(1, LARGEST_SIZE)]
Blocks = Annotated[int, AtLeast(1, 4096)]
Layers = Annotated[int, AtLeast(1, 4096)]
Rows = Annotated[int, AtLeast(1, MOST_ROWS)]
Length = Annotated[int, AtLeast(2, LARGEST_SIZE)]
"""Of a sequence: with fewer tokens, there is nothing to predict."""
Seed = Annotated[int, AtLeast(0, LARGEST_SEED)]
Fraction = Annotated[float, Between(0, 1)]
Part = Annotated[float, Below(1)]
"""Of a whole, some of which is always left."""
Positive = Annotated[float, Above(0)]
NonNegative = Annotated[float, AtLeast(0)]


def check(name: str, value: float, bound: Bound) -> None:
    """Raise MolError if the value, called `name` by the user, is out of range."""
    if not bound.holds(value):
        hint = f"{name}={bound.limit / 4}" if isinstance(bound, Below) else ""
        raise MolError(f"`{name}` is {shown(value)}", allowed=bound.allowed(value), hint=hint)


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
