"""`molcli train`: recover what the conversion lost, or train from scratch."""

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molcli.cli.bars import bar, no_bar
from molcli.cli.distributed import (
    ChildExit,
    check_gpus,
    check_run,
    follow_errors,
    is_launched,
    is_main,
    launch,
    leave_together,
    ranks,
)
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
    from molcli.families.parent import Parent as DenseParent

Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last checkpoint of a stopped run in OUT.")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print parameters, FLOPs, memory by kind and hours; train nothing."
    ),
]
Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        metavar="N",
        min=1,
        help="Train on N GPUs of this machine, which share model and batch, as torchrun would.",
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
    gpus: Gpus = None,
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
    processes = _processes(gpus)
    launches = processes > ranks() and not dry_run
    if settings.train.stages == "auto" or (recipe is None and _says_nothing(settings.train)):
        settings = _planned(
            settings, checkpoint, processes, has_parent=dense is not None, show=not launches
        )
    if dry_run:
        _show_estimate(checkpoint, settings.train, dense, processes)
        return
    if launches:
        check_gpus(processes)
        has = {"parent": dense is not None, "resume": resume}
        check_run(checkpoint, out, settings.train, processes, **has)
        raise ChildExit(launch(processes, ["-m", "molcli", *sys.argv[1:]]))
    if ranks() > 1:
        follow_errors()
    try:
        run_train(checkpoint, out, None, settings, dense, resume=resume)
    except Interrupted as stop:
        stop.resume = _resume_command()
        leave_together()
        raise
    leave_together()
    if is_main():
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

    with bar("training") if is_main() else no_bar() as progress:
        run(checkpoint, out, data, recipe, parent, resume, progress=progress)


def _says_nothing(config: TrainConfig) -> bool:
    """Whether all keys that a plan would set have their defaults."""
    kept = {name: getattr(config, name) for name in _BESIDE_A_PLAN}
    return config == TrainConfig(**kept)


def _processes(gpus: int | None) -> int:
    """That share the training. Raises MolError where torchrun started another number of them."""
    if is_launched() and gpus is not None and gpus != ranks():
        raise MolError(
            f"--gpus is {gpus}, and torchrun started {ranks()} processes",
            allowed="torchrun, or --gpus, which stands for it",
        )
    return ranks() if gpus is None else gpus


def _planned(
    recipe: Recipe, checkpoint: Path, processes: int, *, has_parent: bool, show: bool
) -> Recipe:
    """The recipe with stages planned for the model, which are printed where wanted."""
    from rich.console import Console

    from molcli.model.checkpoint import open_config
    from molcli.report.tables import stages_table
    from molcli.stages.train.plan import Situation, plan

    converted = (checkpoint / "receipt.json").is_file()
    situation = Situation(has_parent, converted, processes)
    config = plan(recipe.train, open_config(checkpoint), situation)
    if show and is_main():
        title = f"Stages planned for {config.tokens:,} tokens"
        stages = resolve(config, has_parent=has_parent)
        Console().print(stages_table(stages, title))
    return replace(recipe, train=config)


def _show_estimate(
    checkpoint: Path, config: TrainConfig, parent: "DenseParent | None", processes: int
) -> None:
    from rich.console import Console

    from molcli.report.tables import estimate_tables
    from molcli.stages.train.plan import estimate

    if is_main():
        for table in estimate_tables(estimate(checkpoint, config, parent, ranks=processes)):
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
    by_hand = is_launched() and not any(word.startswith("--gpus") for word in words)
    here = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", f"--nproc-per-node={here}", "--no-python"] if by_hand else []
    return shlex.join(launcher + words)
