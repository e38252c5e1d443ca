"""The stages of a training run, each with the values that are in force in it."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from molcli.config.sections import StageConfig, TrainConfig

Kind = Literal["align", "distill", "pretrain"]
REPEATS = 0.25
"""What `repeats: null` means where rows can hold text that repeats itself."""
SHORTEST_REPEATS = 48
"""Tokens of the shortest row that can."""


@dataclass(frozen=True)
class Stage:
    """A training stage.

    kind: what is minimised. settings: the train section, with the values that the stage sets.
    """

    kind: Kind
    settings: TrainConfig

    @property
    def repeats(self) -> float:
        """The share of rows that repeat themselves: `repeats`, or the number that null means.

        Cached logits have their own rows, hence 0.
        """
        if self.settings.logits is not None:
            return 0.0
        default = REPEATS if self.kind == "distill" else 0.0
        return repeats_in_force(self.settings.repeats, self.settings.context_length, default)


def repeats_in_force(repeats: float | None, length: int, default: float = REPEATS) -> float:
    """Return the share of rows that repeat themselves; 0 where they are too short.

    Args:
        repeats: As the recipe has it; null is the default.
        length: Tokens in a row.
        default: See there.
    """
    if length < SHORTEST_REPEATS:
        return 0.0
    return default if repeats is None else repeats


def resolve(train: TrainConfig, *, has_parent: bool) -> list[Stage]:
    """Return the stages of a train section whose `stages` is a list or null.

    null is one stage: distill with a parent or its cached logits, pretrain without.
    """
    assert not isinstance(train.stages, str)
    if train.stages is None:
        taught = has_parent or train.logits is not None
        return [Stage("distill" if taught else "pretrain", train)]
    return [Stage(stage.kind, merged(train, stage)) for stage in train.stages]


def section(train: TrainConfig, number: int) -> str:
    """Return the name in front of a stage's keys in a recipe, for error messages."""
    return "train" if train.stages is None else f"train.stages.{number}"


def merged(train: TrainConfig, stage: StageConfig) -> TrainConfig:
    """Return the train section with the values that the stage sets.

    A stage with data of its own does not use the section's `logits`.
    """
    own = {field.name: getattr(stage, field.name) for field in fields(stage)}
    given = {key: value for key, value in own.items() if key != "kind" and value is not None}
    if "data" in given:
        given["logits"] = None
    return replace(train, stages=None, **given)
