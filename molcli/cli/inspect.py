"""`molcli inspect`: show which tokens each block processes."""

from pathlib import Path
from typing import TYPE_CHECKING

from molcli import api
from molcli.cli.options import Checkpoint, Json, Overrides, RecipeName, RequiredData, write_json

if TYPE_CHECKING:  # imports a YAML parser
    from molcli.config.sections import InspectConfig


def inspect(
    checkpoint: Checkpoint,
    data: RequiredData,
    json_file: Json = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
) -> None:
    """Show the routing: load, entropy, dead blocks, weights, and gaps between routed tokens."""
    report = api.inspect(checkpoint, data, recipe=recipe, settings=overrides or ())
    write_json(json_file, report.to_json())
    from rich.console import Console

    from molcli.report.tables import routing_table

    Console().print(routing_table(report))


def run_inspect(checkpoint: Path, data: str, settings: "InspectConfig", json_file: Path) -> None:
    """For `molcli demo`."""
    from molcli.config.sections import Recipe

    report = api.inspect(checkpoint, data, recipe=Recipe(inspect=settings))
    write_json(json_file, report.to_json())
