"""Train a Mixture of Layers model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molcli.api.arguments import Settings, Text, as_data, open_dense, resolve_recipe
from molcli.console import console
from molcli.errors import MolError
from molcli.ranks import is_main, ranks
from molcli.report.bars import bar

if TYPE_CHECKING:  # these import torch, or take time to import
    from molcli.config.sections import Recipe, TrainConfig
    from molcli.families.parent import Parent
    from molcli.stages.train import TrainResult

# The keys of the train section that a plan leaves as they are.
_KEPT_BY_A_PLAN = (
    *("data", "repeats", "tokens", "seed", "precision", "compile", "gradient_checkpointing"),
    *("checkpoint_every", "log_every", "max_skipped", "trackers"),
)


def train(
    checkpoint: str | Path,
    out: str | Path,
    *,
    data: Text | None = None,
    parent: str | Path | Parent | None = None,
    logits: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    settings: Settings = (),
    resume: bool = False,
    progress: bool = True,
    **values: Any,
) -> TrainResult:
    """Train a Mixture of Layers model, in this process or as one of torchrun's.

    With a parent or its cached logits, by distillation from its predictions (`train.kl_weight`);
    without, on the text alone. The stages are planned from the model's size and `train.tokens`
    where no recipe is given and the train section sets nothing but the length of the run, as with
    `train.stages: auto`.

    Args:
        checkpoint: The folder of a Mixture of Layers model.
        out: The folder to write; must not exist.
        data: Text to train on, several sources mixed by weight.
        parent: The dense model to distil from: a folder with safetensors, a Hub id, a .gguf file.
        logits: A folder of `molcli data cache-logits`, in place of `data` and `parent`.
        recipe: A .yaml file, the name of a bundled recipe, or a loaded recipe. None takes the one
            saved in the checkpoint.
        settings: Values that replace those of the recipe, such as {"train.tokens": 30_000_000}.
        resume: Continue from the last checkpoint of a stopped run in `out`.
        progress: Print the planned stages and draw a progress bar.
        **values: Keys of the section `train`, such as tokens=30_000_000.

    Returns:
        Steps, tokens, seconds and the last loss.

    Raises:
        MolError: Checkpoint, recipe, text or output folder cannot be used, too many steps in a row
            had no finite gradient, or the disk is full.
        Interrupted: SIGINT or SIGTERM stopped the run after a step. Its state is saved in `out`.

    Example:
        >>> molcli.train("out", "trained", data={"a.jsonl": 0.7, "b.txt": 0.3}, parent="parent")
    """
    training = prepare_training(
        Path(checkpoint),
        data=data,
        parent=parent,
        logits=logits,
        recipe=recipe,
        settings=settings,
        values=values,
        progress=progress,
    )
    return run_training(training, Path(out), resume=resume, progress=progress)


@dataclass(frozen=True)
class Training:
    """A training run that can start: its recipe, with planned stages, and the opened parent."""

    checkpoint: Path
    recipe: Recipe
    parent: Parent | None


def prepare_training(
    checkpoint: Path,
    *,
    data: Text | None,
    parent: str | Path | Parent | None,
    logits: str | Path | None,
    recipe: str | Path | Recipe | None,
    settings: Settings,
    values: Mapping[str, Any],
    processes: int | None = None,
    needs_data: bool = True,
    shows_plan: bool = True,
    progress: bool = True,
) -> Training:
    """Resolve the arguments of `train`, open the parent and plan the stages.

    Args:
        processes: Number of processes that will share a batch; None is the number of this run.
        needs_data: False accepts a run without text, as for an estimate of its cost.
        shows_plan: Print the planned stages.
        progress: Print anything.

    Raises:
        MolError: The arguments contradict each other, or something that the run needs is missing.
    """
    found = resolve_recipe("train", recipe, settings, values, checkpoint=checkpoint)
    text, cache = as_data(data), None if logits is None else str(logits)
    if cache is not None and (text is not None or parent is not None):
        raise MolError(
            "--logits comes with its own text and predictions",
            allowed="--logits alone, or --data with or without --parent",
        )
    if cache is not None or text is not None:
        found = replace(found, train=replace(found.train, data=text, logits=cache))
    if found.train.logits is not None and parent is not None:
        raise MolError(
            "`train.logits` is set, and there is a --parent", hint="--set train.logits=null"
        )
    if needs_data:
        _refuse_without_data(found.train)
    dense = None if parent is None else open_dense(parent, show_note=progress)
    if found.train.stages == "auto" or (recipe is None and _only_length_is_set(found.train)):
        shown = progress and shows_plan and is_main()
        count = ranks() if processes is None else processes
        found = _planned(found, checkpoint, count, has_parent=dense is not None, shown=shown)
    return Training(checkpoint, found, dense)


def run_training(
    training: Training, out: Path, *, resume: bool = False, progress: bool = True
) -> TrainResult:
    """Train under a progress bar. Raises as `train`."""
    from molcli.stages.train import train as run

    with bar("training", shown=progress) as report:
        return run(
            training.checkpoint,
            out,
            None,  # the recipe names the text
            training.recipe,
            training.parent,
            resume,
            progress=report,
        )


def _only_length_is_set(config: TrainConfig) -> bool:
    """Whether all keys that a plan would set have their defaults."""
    from molcli.config.sections import TrainConfig

    kept = {name: getattr(config, name) for name in _KEPT_BY_A_PLAN}
    return config == TrainConfig(**kept)


def _planned(
    recipe: Recipe, checkpoint: Path, processes: int, *, has_parent: bool, shown: bool
) -> Recipe:
    """The recipe with stages planned for the model, which are printed if `shown`."""
    from molcli.config.stages import resolve
    from molcli.model.checkpoint import open_config
    from molcli.report.training import stages_table
    from molcli.stages.train.plan import Situation, plan

    converted = (checkpoint / "receipt.json").is_file()
    situation = Situation(has_parent, converted, processes)
    config = plan(recipe.train, open_config(checkpoint), situation)
    if shown:
        title = f"Stages planned for {config.tokens:,} tokens"
        console().print(stages_table(resolve(config, has_parent=has_parent), title))
    return replace(recipe, train=config)


def _refuse_without_data(config: TrainConfig) -> None:
    """Raise MolError if a stage has nothing to train on."""
    stages = config.stages if isinstance(config.stages, list) else [config]
    common = config.data is not None or config.logits is not None
    if not common and any(stage.data is None for stage in stages):
        raise MolError(
            "there is nothing to train on",
            allowed="--data SOURCE, --logits DIR, or train.data in the recipe",
            hint="molcli data sample PARENT text.jsonl samples text from the parent",
        )
