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

    The text is that of --data, else of calibrate.data or of train.data in the recipe, else sampled
    from the parent. A part of it repeats itself (calibrate.repeats).
    """
    api.calibrate(parent, out, data=data_for(data), recipe=recipe, settings=overrides or ())
    say(f"Calibration in {out}")
