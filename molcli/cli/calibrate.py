"""`molcli calibrate`: what the conversion needs to know about the parent's activations."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import typer

from molcli.cli.bars import bar
from molcli.cli.data.sample import run_sample
from molcli.cli.options import Data, Out, Overrides, Parent, RecipeName, data_for, recipe_for
from molcli.cli.parents import open_dense
from molcli.config.sections import CalibrateConfig, Recipe
from molcli.config.sections import Data as DataSpec

if TYPE_CHECKING:  # torch comes with it
    from molcli.families.parent import Parent as DenseParent


def calibrate(
    parent: Parent,
    out: Out,
    data: Data = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
) -> None:
    """Run text through the parent and keep the statistics that `upcycle` fits to.

    Without --data, the text is sampled from the parent itself.
    """
    settings = with_data(recipe_for(recipe, overrides), data_for(data))
    run_calibrate(open_dense(parent), settings, out)
    typer.echo(f"Calibration in {out}")


def with_data(recipe: Recipe, data: DataSpec | None) -> Recipe:
    """The recipe with `--data` in place of its calibrate.data."""
    return (
        recipe if data is None else replace(recipe, calibrate=replace(recipe.calibrate, data=data))
    )


def run_calibrate(parent: "DenseParent", recipe: Recipe, out: Path) -> None:
    """Writes the calibration of `recipe.calibrate`; samples its text first where data is null."""
    from molcli.stages.calibrate import calibrate as collect

    settings = recipe.calibrate
    with scratch_beside(out) as scratch:
        if settings.data is None:
            settings = with_sample(parent, recipe, scratch)
        with bar("calibrating") as progress:
            collect(parent, settings, out, progress=progress)


def with_sample(parent: "DenseParent", recipe: Recipe, scratch: Path) -> CalibrateConfig:
    """recipe.calibrate, with as much text as it wants sampled from the parent into `scratch`."""
    settings, text = recipe.calibrate, scratch / "sample.jsonl"
    tokens = settings.tokens + settings.heldout_tokens
    run_sample(parent, replace(recipe.sample, tokens=tokens, seed=settings.seed), text)
    return replace(settings, data=str(text))


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """A hidden folder on the output's disk, gone afterwards: /tmp is often small or in memory."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".molcli-", dir=out.parent) as folder:
        yield Path(folder)
