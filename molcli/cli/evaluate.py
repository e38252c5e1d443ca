"""`molcli eval`: measure a checkpoint, and its parent beside it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molcli import api
from molcli.cli.options import (
    Checkpoint,
    Json,
    OneSource,
    Overrides,
    ParentOption,
    RecipeName,
    write_json,
)
from molcli.report.bars import bar

if TYPE_CHECKING:  # these import torch or a YAML parser
    from molcli.config.sections import EvaluateConfig
    from molcli.families.parent import Parent as DenseParent
    from molcli.stages.evaluate import Evaluation

TaskNames = Annotated[
    str | None,
    typer.Option(
        "--tasks", "-t", metavar="A,B", help="Tasks of lm-eval, which the extra `eval` installs."
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
    """Measure a model, and its parent beside it with --parent.

    Always: recall of a value by its key. With --data, held-out text: cross-entropy, KL to the
    parent, and how long greedy continuations of both agree. With --tasks, tasks of lm-eval.
    """
    report = api.evaluate(
        checkpoint,
        data=data,
        parent=parent,
        tasks=None if tasks is None else [name for name in tasks.split(",") if name],
        include_path=include_path,
        recipe=recipe,
        settings=overrides or (),
    )
    write_json(json_file, report.to_json())
    from rich.console import Console

    from molcli.report.tables import report_tables

    console = Console()
    for table in report_tables(str(checkpoint), report):
        console.print(table)
    for figure, reason in report.skipped.items():
        typer.echo(f"note: no {figure}: {reason}", err=True)


def run_evaluate(
    checkpoint: Path, parent: "DenseParent | None", data: str, settings: "EvaluateConfig"
) -> "Evaluation":
    """For `molcli demo`: held-out figures alone."""
    from molcli.stages.evaluate import evaluate as predict

    with bar("evaluating") as progress:
        return predict(checkpoint, parent, data, settings, progress=progress)
