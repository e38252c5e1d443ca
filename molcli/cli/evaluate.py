"""`molcli eval`: held-out figures of a checkpoint beside its parent's."""

import json

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
    from molcli.stages.evaluate import evaluate as measure

    dense = None if parent is None else open_dense(parent)
    with bar("evaluating") as progress:
        figures = measure(checkpoint, dense, data, settings, progress=progress)
    if json_file is not None:
        json_file.write_text(json.dumps(figures.to_json(), indent=2) + "\n", encoding="utf-8")
    beside = parent_figures(figures)
    rows = {} if beside is None else {"parent": beside}
    title = f"{figures.tokens:,} held-out tokens, nats a token"
    Console().print(figures_table(title, rows | {str(checkpoint): figures_of(figures)}))
