"""`molcli upcycle`: a dense parent becomes a Mixture of Layers model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molcli.cli.bars import bar
from molcli.cli.calibrate import run_calibrate, scratch_beside, with_data
from molcli.cli.options import (
    Data,
    Out,
    Overrides,
    Parent,
    Preset,
    RecipeName,
    data_for,
    recipe_for,
)
from molcli.cli.parents import open_dense
from molcli.config.sections import Recipe

if TYPE_CHECKING:  # torch comes with it
    from molcli.families.parent import Parent as DenseParent

Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="DIR",
        help="A folder that `molcli calibrate` wrote; without it, calibration runs first.",
    ),
]


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

    --data is the text to calibrate on; without it, the text is sampled from the parent itself.
    """
    settings = with_data(recipe_for(recipe, overrides, preset=preset), data_for(data))
    from molcli.files.folders import refuse_existing

    refuse_existing(out)
    run_upcycle(open_dense(parent), settings, out, calibration=calibration)
    from molcli.report.tables import show_receipt

    show_receipt(out)


def run_upcycle(
    parent: "DenseParent", recipe: Recipe, out: Path, *, calibration: Path | None = None
) -> None:
    """Writes the model to `out`, after a calibration of its own where none is given.

    Where blocks are not fitted to text, none is sampled for them, and the receipt of a conversion
    without text has no held-out figures.
    """
    from molcli.fitting.converted_config import mol_config, needs_text
    from molcli.stages.upcycle import upcycle as convert

    # Before the long calibration: a recipe that does not fit the parent is refused here.
    needed = needs_text(mol_config(parent, recipe.upcycle), recipe.upcycle)
    with scratch_beside(out) as scratch:
        if calibration is None and (recipe.calibrate.data is not None or needed):
            calibration = scratch / "calibration"
            run_calibrate(parent, recipe, calibration)
        with bar("upcycling") as progress:
            convert(parent, calibration, recipe, out, progress=progress)
