"""`molcli convert`: turn softmax attention of a checkpoint into Gated DeltaNet."""

from typing import Annotated

import typer

from molcli import api
from molcli.cli.options import (
    Calibration,
    Checkpoint,
    Data,
    Out,
    Overrides,
    ParentOption,
    RecipeName,
    data_for,
)

Layers = Annotated[
    str | None,
    typer.Option(
        "--gated-deltanet",
        metavar="LAYERS",
        help="all, auto, every:N, none, or layers such as 0,3,7, which may be dense ones.",
        show_default=False,
    ),
]


def convert(
    checkpoint: Checkpoint,
    out: Out,
    gated_deltanet: Layers = None,
    parent: ParentOption = None,
    calibration: Calibration = None,
    data: Data = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
) -> None:
    """Turn softmax attention of a Mixture of Layers model into Gated DeltaNet.

    It is fitted to --data, else to the text of --calibration, else to calibrate.data in the recipe,
    else to text sampled from --parent. Without --recipe, the recipe saved in CKPT is used.
    """
    api.convert(
        checkpoint,
        out,
        gated_deltanet=gated_deltanet,
        data=data_for(data),
        calibration=calibration,
        parent=parent,
        recipe=recipe,
        settings=overrides or (),
    )
    from molcli.report.convert_table import show_conversion

    show_conversion(out)
