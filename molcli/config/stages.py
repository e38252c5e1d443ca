"""The stages of a training run, each with the values that count in it."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from molcli.config.sections import StageConfig, TrainConfig

Kind = Literal["align", "distill", "pretrain"]


@dataclass(frozen=True)
class Stage:
    """kind: what is minimised. settings: the train section with the stage's own values in place."""

    kind: Kind
    settings: TrainConfig


def resolve(train: TrainConfig, *, has_parent: bool) -> list[Stage]:
    """The stages of a train section whose `stages` is a list or null.

    Null is one stage: distill with a parent or its cached logits, pretrain without.
    """
    assert not isinstance(train.stages, str)
    if train.stages is None:
        taught = has_parent or train.logits is not None
        return [Stage("distill" if taught else "pretrain", train)]
    return [Stage(stage.kind, merged(train, stage)) for stage in train.stages]


def section(train: TrainConfig, number: int) -> str:
    """Where in a recipe a stage's own values are: what its keys are called."""
    return "train" if train.stages is None else f"train.stages.{number}"


def merged(train: TrainConfig, stage: StageConfig) -> TrainConfig:
    """The train section as it counts in this stage. Its own data leaves no use for `logits`."""
    own = {field.name: getattr(stage, field.name) for field in fields(stage)}
    given = {key: value for key, value in own.items() if key != "kind" and value is not None}
    if "data" in given:
        given["logits"] = None
    return replace(train, stages=None, **given)
