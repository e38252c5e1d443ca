"""`molcli calibrate`: collect what the conversion needs to know about the parent's activations."""

from molcli import api
from molcli.cli.options import Data, Out, Overrides, Parent, RecipeName, data_for
from molcli.console import say


def calibrate(
    parent: Parent,
    out: Out,
    data: Data = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
) -> None:
    """Run text through the parent and keep the statistics that `upcycle` fits to.

    Without --data or calibrate.data in the recipe, text is sampled from the parent.
    """
    api.calibrate(parent, out, data=data_for(data), recipe=recipe, settings=overrides or ())
    say(f"Calibration in {out}")
