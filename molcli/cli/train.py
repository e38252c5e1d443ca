"""`molcli train`: recover what the conversion lost, or train from scratch."""

import os
import shlex
import sys
from typing import Annotated

import typer

from molcli.api.training import Training, prepare_training, run_training
from molcli.cli.distributed import (
    ChildExit,
    check_gpus,
    check_run,
    follow_errors,
    launch,
    leave_together,
)
from molcli.cli.options import (
    Checkpoint,
    Data,
    Overrides,
    ParentOption,
    RecipeName,
    ResumableOut,
    data_for,
)
from molcli.console import console, say
from molcli.errors import Interrupted, MolError
from molcli.ranks import is_launched, is_main, ranks

Resume = Annotated[
    bool, typer.Option("--resume", help="Continue from the last checkpoint of a stopped run.")
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
        help="Train on N GPUs of this machine, which split model and batch, as with torchrun.",
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


def train(
    checkpoint: Checkpoint,
    out: ResumableOut,
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

    With --parent or --logits, by distillation from the parent's predictions (train.kl_weight);
    without, on the text alone.
    Without --recipe, the recipe saved in CKPT is used. Where it sets nothing about training but the
    length of the run, the stages are planned from the model's size and train.tokens.
    """
    processes = _processes(gpus)
    launches = processes > ranks() and not dry_run
    training = prepare_training(
        checkpoint,
        data=data_for(data),
        parent=parent,
        logits=logits,
        recipe=recipe,
        settings=overrides or (),
        values={},
        processes=processes,
        needs_data=not dry_run,
        shows_plan=not launches,
    )
    if dry_run:
        _show_estimate(training, processes)
        return
    if launches:
        check_gpus(processes)
        has_parent = training.parent is not None
        check_run(
            checkpoint, out, training.recipe.train, processes, parent=has_parent, resume=resume
        )
        raise ChildExit(launch(processes, ["-m", "molcli", *sys.argv[1:]]))
    if ranks() > 1:
        follow_errors()
    try:
        run_training(training, out, resume=resume)
    except Interrupted as stop:
        stop.resume = _resume_command()
        leave_together()
        raise
    leave_together()
    if is_main():
        say(f"Trained model in {out}")


def _processes(gpus: int | None) -> int:
    """Return how many processes train. Raise MolError if torchrun started another number."""
    if is_launched() and gpus is not None and gpus != ranks():
        raise MolError(
            f"--gpus is {gpus}, and torchrun started {ranks()} processes",
            allowed="torchrun, or --gpus in place of it",
        )
    return ranks() if gpus is None else gpus


def _show_estimate(training: Training, processes: int) -> None:
    from molcli.report.training import estimate_tables
    from molcli.stages.train.plan import estimate

    if is_main():
        found = estimate(
            training.checkpoint, training.recipe.train, training.parent, ranks=processes
        )
        for table in estimate_tables(found):
            console().print(table)


def _resume_command() -> str:
    """Return this command with --resume."""
    words = ["molcli", *(word for word in sys.argv[1:] if word != "--resume"), "--resume"]
    by_hand = is_launched() and not any(word.startswith("--gpus") for word in words)
    here = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", f"--nproc-per-node={here}", "--no-python"] if by_hand else []
    return shlex.join(launcher + words)
