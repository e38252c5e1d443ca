"""`molcli eval`: measure a checkpoint, and its parent beside it."""

from pathlib import Path
from typing import Annotated

import typer

from molcli import api
from molcli.cli.figures import Json, check_json, show_figures
from molcli.cli.options import (
    Checkpoint,
    OneSource,
    Overrides,
    ParentOption,
    RecipeName,
)
from molcli.console import note

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

    Recall of a value by its key, where there is a tokenizer. With --data, held-out text:
    cross-entropy; with --parent, too, KL and how long greedy continuations of both agree. With
    --tasks, tasks of lm-eval. Without --recipe, the recipe saved in CKPT is used.
    """
    check_json(json_file)
    report = api.evaluate(
        checkpoint,
        data=data,
        parent=parent,
        tasks=None if tasks is None else [name for name in tasks.split(",") if name],
        include_path=include_path,
        recipe=recipe,
        settings=overrides or (),
    )
    from molcli.report.evaluation import evaluation_tables

    for figure, reason in report.skipped.items():
        note(f"no {figure}: {reason}")
    show_figures(evaluation_tables(str(checkpoint), report), json_file, report.to_json())
