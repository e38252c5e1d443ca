"""`molcli eval`: figures of a checkpoint beside its parent's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molcli.cli.bars import bar
from molcli.cli.options import (
    Checkpoint,
    Json,
    OneSource,
    Overrides,
    ParentOption,
    RecipeName,
    recipe_for,
)
from molcli.cli.parents import open_dense
from molcli.config.sections import EvaluateConfig
from molcli.errors import MolError

if TYPE_CHECKING:  # torch comes with them
    from molcli.families.parent import Parent as DenseParent
    from molcli.stages.evaluate import Evaluation, Report

TaskNames = Annotated[
    str | None,
    typer.Option(
        "--tasks", "-t", metavar="A,B", help="Tasks of lm-eval, which the extra `eval` brings."
    ),
]
IncludePath = Annotated[
    Path | None,
    typer.Option("--include-path", metavar="DIR", help="A folder with task files of your own."),
]


def evaluate(
    checkpoint: Checkpoint,
    data: OneSource = None,
    parent: ParentOption = None,
    tasks: TaskNames = None,
    include_path: IncludePath = None,
    json_file: Json = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
) -> None:
    """Measure a model, beside its parent with --parent.

    Recall of a value by its key needs nothing else. With --data, held-out text: cross-entropy, KL
    to the parent, and how far both continue it alike. With --tasks, tasks of lm-eval.
    """
    settings = recipe_for(recipe, overrides, checkpoint).evaluate
    from rich.console import Console

    from molcli.report.evaluation import evaluation_tables

    dense = None if parent is None else open_dense(parent)
    names = None if tasks is None else [name for name in tasks.split(",") if name]
    report = run_measure(checkpoint, dense, data, settings, names, include_path)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    console = Console()
    for table in evaluation_tables(str(checkpoint), report):
        console.print(table)
    for figure, reason in report.skipped.items():
        typer.echo(f"note: no {figure}: {reason}", err=True)


def run_measure(
    checkpoint: Path,
    parent: "DenseParent | None",
    data: str | None,
    settings: EvaluateConfig,
    tasks: list[str] | None,
    include_path: Path | None,
) -> "Report":
    """All figures: held-out text and recall under a bar, then lm-eval's tasks under its own."""
    from molcli.stages.evaluate import measure, open_models, open_tasks

    if include_path is not None and tasks is None:
        raise MolError(
            f"--include-path is {include_path}, but there are no --tasks",
            hint=f"--include-path {include_path} --tasks NAME",
        )
    known = None if tasks is None else open_tasks(tasks, include_path)
    with bar("evaluating") as progress:
        models = open_models(checkpoint, parent)
        report = measure(models, data, settings, progress)
    if known is not None:
        return replace(report, tasks=known.run(models, settings.batch_size))
    if report.heldout is None and not report.recall:
        reason = report.skipped.get("recall", "evaluate.recall_sequences is 0")
        raise MolError(
            f"there is nothing to measure: no --data, no --tasks, and no recall ({reason})",
            allowed="at least one of them",
            hint=f"molcli eval {checkpoint} --data heldout.txt",
        )
    return report


def run_evaluate(
    checkpoint: Path, parent: "DenseParent | None", data: str, settings: EvaluateConfig
) -> "Evaluation":
    """Held-out figures alone, under a bar; beside the parent's if there is one."""
    from molcli.stages.evaluate import evaluate as predict

    with bar("evaluating") as progress:
        return predict(checkpoint, parent, data, settings, progress=progress)
