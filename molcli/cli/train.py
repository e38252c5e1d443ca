"""`molcli train`: recover what the conversion lost, or train from scratch."""

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molcli.cli.bars import bar
from molcli.cli.options import (
    Checkpoint,
    Data,
    Out,
    Overrides,
    ParentOption,
    RecipeName,
    data_for,
    recipe_for,
)
from molcli.cli.parents import open_dense
from molcli.config.sections import Data as DataSpec
from molcli.config.sections import Recipe, TrainConfig
from molcli.config.stages import resolve
from molcli.errors import Interrupted, MolError

if TYPE_CHECKING:  # torch comes with it
    from molcli.io.parent import Parent as DenseParent

Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last checkpoint of a stopped run in OUT.")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print parameters, FLOPs, memory by kind and hours; train nothing."
    ),
]
Logits = Annotated[
    str | None,
    typer.Option(
        "--logits",
        metavar="DIR",
        help="A folder of `molcli data cache-logits`, in place of --data and --parent.",
    ),
]
# The keys of the train section that a plan leaves as they are.
_BESIDE_A_PLAN = (
    *("data", "tokens", "seed", "precision", "compile", "gradient_checkpointing"),
    *("checkpoint_every", "log_every", "max_skipped", "trackers"),
)


def train(
    checkpoint: Checkpoint,
    out: Out,
    data: Data = None,
    parent: ParentOption = None,
    logits: Logits = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Train a Mixture of Layers model.

    With --parent or --logits, towards the parent's predictions (train.kl_weight); without, on the
    text alone.
    Without --recipe, the recipe saved in CKPT counts; where that says nothing about training but
    how long, the stages are planned from the model's size and train.tokens.
    """
    settings = recipe_for(recipe, overrides, checkpoint)
    text = data_for(data)
    if logits is not None and (text is not None or parent is not None):
        raise MolError(
            "--logits comes with its own text and predictions",
            allowed="--logits alone, or --data with or without --parent",
        )
    if logits is not None or text is not None:
        settings = replace(settings, train=replace(settings.train, data=text, logits=logits))
    if settings.train.logits is not None and parent is not None:
        raise MolError(
            "`train.logits` is set, and there is a --parent", hint="--set train.logits=null"
        )
    if not dry_run:
        _refuse_without_data(settings.train)
    dense = None if parent is None else open_dense(parent)
    if settings.train.stages == "auto" or (recipe is None and _says_nothing(settings.train)):
        settings = _planned(settings, checkpoint, has_parent=dense is not None)
    if dry_run:
        _show_estimate(checkpoint, settings.train, dense)
        return
    try:
        run_train(checkpoint, out, None, settings, dense, resume=resume)
    except Interrupted as stop:
        stop.resume = _resume_command()
        raise
    typer.echo(f"Trained model in {out}")


def run_train(
    checkpoint: Path,
    out: Path,
    data: DataSpec | None,
    recipe: Recipe,
    parent: "DenseParent | None",
    *,
    resume: bool = False,
) -> None:
    """Trains under a bar; towards a parent's predictions if it or its cached logits are there."""
    from molcli.stages.train import train as run

    with bar("training") as progress:
        run(checkpoint, out, data, recipe, parent, resume, progress=progress)


def _says_nothing(config: TrainConfig) -> bool:
    """Whether all keys that a plan would set have their defaults."""
    kept = {name: getattr(config, name) for name in _BESIDE_A_PLAN}
    return config == TrainConfig(**kept)


def _planned(recipe: Recipe, checkpoint: Path, *, has_parent: bool) -> Recipe:
    """The recipe with stages planned for the model, which are printed."""
    from rich.console import Console

    from molcli.cli.train_tables import stages_table
    from molcli.model.checkpoint import open_config
    from molcli.stages.train.plan import Situation, plan

    converted = (checkpoint / "receipt.json").is_file()
    situation = Situation(has_parent, converted, int(os.environ.get("WORLD_SIZE", "1")))
    config = plan(recipe.train, open_config(checkpoint), situation)
    if os.environ.get("RANK", "0") == "0":
        title = f"Stages planned for {config.tokens:,} tokens"
        stages = resolve(config, has_parent=has_parent)
        Console().print(stages_table(stages, title))
    return replace(recipe, train=config)


def _show_estimate(checkpoint: Path, config: TrainConfig, parent: "DenseParent | None") -> None:
    from rich.console import Console

    from molcli.cli.train_tables import estimate_tables
    from molcli.stages.train.estimate import estimate

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    for table in estimate_tables(estimate(checkpoint, config, parent, ranks=ranks)):
        Console().print(table)


def _refuse_without_data(config: TrainConfig) -> None:
    """Raises MolError if a stage has nothing to train on."""
    stages = config.stages if isinstance(config.stages, list) else [config]
    common = config.data is not None or config.logits is not None
    if not common and any(stage.data is None for stage in stages):
        raise MolError(
            "there is nothing to train on",
            allowed="--data SOURCE, --logits DIR, or train.data in the recipe",
            hint="molcli data sample PARENT text.jsonl draws text from the parent",
        )


def _resume_command() -> str:
    """This very command, with --resume."""
    words = ["molcli", *(word for word in sys.argv[1:] if word != "--resume"), "--resume"]
    ranks = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun started this process
    launcher = [] if ranks is None else ["torchrun", f"--nproc-per-node={ranks}", "--no-python"]
    return shlex.join(launcher + words)
