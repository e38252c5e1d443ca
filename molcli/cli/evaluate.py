"""`molcli eval`: held-out figures of a checkpoint beside its parent's."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from molcli.cli.bars import bar
from molcli.cli.options import (
    Checkpoint,
    Json,
    Overrides,
    ParentOption,
    RecipeName,
    RequiredData,
    recipe_for,
)
from molcli.cli.parents import open_dense
from molcli.config.sections import EvaluateConfig

if TYPE_CHECKING:  # torch comes with them
    from molcli.io.parent import Parent as DenseParent
    from molcli.stages.evaluate import Evaluation


def evaluate(
    checkpoint: Checkpoint,
    data: RequiredData,
    parent: ParentOption = None,
    json_file: Json = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
) -> None:
    """Measure cross-entropy and, with --parent, KL to it, on held-out text."""
    settings = recipe_for(recipe, overrides, checkpoint).evaluate
    from rich.console import Console

    from molcli.cli.tables import figures_of, figures_table, parent_figures

    dense = None if parent is None else open_dense(parent)
    figures = run_evaluate(checkpoint, dense, data, settings)
    if json_file is not None:
        json_file.write_text(json.dumps(figures.to_json(), indent=2) + "\n", encoding="utf-8")
    beside = parent_figures(figures)
    rows = {} if beside is None else {"parent": beside}
    title = f"{figures.tokens:,} held-out tokens, nats a token"
    Console().print(figures_table(title, rows | {str(checkpoint): figures_of(figures)}))


def run_evaluate(
    checkpoint: Path, parent: "DenseParent | None", data: str, settings: EvaluateConfig
) -> "Evaluation":
    """Measures a checkpoint under a bar; beside its parent if there is one."""
    from molcli.stages.evaluate import evaluate as measure

    with bar("evaluating") as progress:
        return measure(checkpoint, parent, data, settings, progress=progress)
