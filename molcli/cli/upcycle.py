"""`molcli upcycle`: turn a dense model into a Mixture of Layers model."""

from typing import Any, cast

from molcli import api
from molcli.cli.options import (
    Calibration,
    Data,
    Out,
    Overrides,
    Parent,
    Preset,
    RecipeName,
    data_for,
)


def upcycle(
    parent: Parent,
    out: Out,
    recipe: RecipeName = None,
    preset: Preset = None,
    overrides: Overrides = None,
    data: Data = None,
    calibration: Calibration = None,
) -> None:
    """Turn a dense model into a Mixture of Layers model.

    Slices or thin blocks are fitted to --calibration, else to the text of --data, of calibrate.data
    or of train.data in the recipe, else to text sampled from the parent. Several --data are mixed
    by weight, and a part of the text repeats itself (calibrate.repeats).
    """
    api.upcycle(
        parent,
        out,
        data=data_for(data),
        preset=cast(Any, preset),  # checked with the recipe
        calibration=calibration,
        recipe=recipe,
        settings=overrides or (),
    )
    from molcli.report.receipt import print_receipt

    print_receipt(out)
