"""What a mutation is."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random


class Effect(Enum):
    """What a command may do with the changed input, besides refusing it."""

    ANY = "any result"  # the change may be a valid input of its own
    SAME = "the result of the unchanged input, or a refusal"
    HARMLESS = "the result of the unchanged input, and no refusal"


class NotApplicable(Exception):
    """The input has nothing that this mutation changes."""


@dataclass(frozen=True)
class Mutation:
    """A kind of change.

    Attributes:
        name: in the table of faults.
        change: changes the input in place, a file or a folder, with draws from the generator.
            Returns what it did, in words.
        effect: what may come of it.
    """

    name: str
    change: Callable[[Path, Random], str]
    effect: Effect = Effect.ANY


def pick_file(path: Path, draw: Random, *patterns: str) -> Path:
    """One of the files of the input that match any of the patterns; the input, if it is a file."""
    if path.is_file():
        found = [path] if any(path.match(pattern) for pattern in patterns or ("*",)) else []
    else:
        found = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and any(file.match(pattern) for pattern in patterns or ("*",))
        )
    if not found:
        raise NotApplicable
    return draw.choice(found)


def shown(path: Path, root: Path) -> str:
    """The name of a file below the input, or its own."""
    return str(path.relative_to(root)) if path != root else path.name


def some_number(draw: Random) -> int:
    """A number that a count, a length or an offset should not be."""
    return draw.choice(
        [
            *(0, 1, 2, 3, 7, 255, 2**16, 2**24 + 1),
            *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
            int(math.exp(draw.uniform(0, 43))),
        ]
    )
