"""`molcli inspect`: show which tokens each block processes."""

from molcli import api
from molcli.cli.options import Checkpoint, Json, Overrides, RecipeName, RequiredData, write_json


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

    from molcli.report.routing import routing_table

    Console().print(routing_table(report))
