"""`molcli inspect`: which tokens each block sees."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from molcli.cli.bars import bar
from molcli.cli.options import (
    Checkpoint,
    Json,
    Overrides,
    RecipeName,
    RequiredData,
    recipe_for,
)
from molcli.config.sections import InspectConfig

if TYPE_CHECKING:  # torch comes with it
    from molcli.stages.inspect import RoutingReport


def inspect(
    checkpoint: Checkpoint,
    data: RequiredData,
    json_file: Json = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
) -> None:
    """Show the routing: load, entropy, dead blocks, weights, and gaps between seen tokens."""
    settings = recipe_for(recipe, overrides, checkpoint).inspect
    from rich.console import Console

    from molcli.report.routing import routing_table

    Console().print(routing_table(run_inspect(checkpoint, data, settings, json_file)))


def run_inspect(
    checkpoint: Path, data: str, settings: InspectConfig, json_file: Path | None
) -> "RoutingReport":
    """Counts under a bar; the report goes to `json_file`, too, if there is one."""
    from molcli.stages.inspect import inspect_routing

    with bar("inspecting") as progress:
        report = inspect_routing(checkpoint, data, settings, progress=progress)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return report
