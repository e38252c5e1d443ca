"""`molcli inspect`: statistics of the routing."""

from molcli import api
from molcli.cli.figures import Json, check_json, show_figures
from molcli.cli.options import Checkpoint, Overrides, RecipeName, RequiredData


def inspect(
    checkpoint: Checkpoint,
    data: RequiredData,
    json_file: Json = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
) -> None:
    """Show the routing: load, entropy, dead blocks, weights, and gaps between routed tokens.

    The table has a line for each layer, the file of --json the figures of each block.
    Without --recipe, the recipe saved in CKPT is used.
    """
    check_json(json_file)
    report = api.inspect(checkpoint, data, recipe=recipe, settings=overrides or ())
    from molcli.report.routing import routing_table

    show_figures([routing_table(report)], json_file, report.to_json())
