"""`molcli convert`: softmax attention of a checkpoint becomes Gated DeltaNet."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molcli.cli.bars import bar
from molcli.cli.calibrate import scratch_beside, with_data, with_sample
from molcli.cli.options import (
    Checkpoint,
    Data,
    Out,
    Overrides,
    ParentOption,
    RecipeName,
    data_for,
    recipe_for,
)
from molcli.cli.parents import open_dense
from molcli.cli.upcycle import Calibration
from molcli.config.sections import Recipe
from molcli.errors import MolError

if TYPE_CHECKING:  # torch comes with it
    from molcli.families.parent import Parent as DenseParent
    from molcli.stages.convert import ConversionText, SourceCheckpoint

Layers = Annotated[
    str | None,
    typer.Option(
        "--gated-deltanet",
        metavar="LAYERS",
        help="all, auto, every:N, none, or layers such as 0,3,7, dense ones too.",
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

    It is fitted on --data, on the text of a calibration, or on text sampled from --parent.
    Without --recipe, the recipe saved in CKPT counts.
    """
    settings = with_data(recipe_for(recipe, overrides, checkpoint), data_for(data))
    if gated_deltanet is not None:
        settings = _with_layers(settings, gated_deltanet)
    from molcli.files.folders import refuse_existing

    refuse_existing(out)
    dense = None if parent is None else open_dense(parent)
    known = None if data else calibration
    run_convert(checkpoint, settings, out, parent=dense, calibration=known)
    _show(out)


def run_convert(
    checkpoint: Path,
    recipe: Recipe,
    out: Path,
    *,
    parent: "DenseParent | None" = None,
    calibration: Path | None = None,
) -> None:
    """Writes the converted model to `out`. Text: that of the calibration, or else
    recipe.calibrate.data, or a sample of the parent's."""
    from molcli.stages.convert import convert as run
    from molcli.stages.convert import open_source_checkpoint, select_layers

    source = open_source_checkpoint(checkpoint)
    # Before any text is read or sampled: a choice that does not fit the model is refused here.
    selection = select_layers(source.config, recipe.convert.gated_deltanet)
    with scratch_beside(out) as scratch:
        text = None
        if selection.layers != set():
            text = _text(source, recipe, parent, calibration, scratch)
        with bar("converting") as progress:
            run(source, text, recipe, out, progress=progress)


def _text(
    source: "SourceCheckpoint",
    recipe: Recipe,
    parent: "DenseParent | None",
    calibration: Path | None,
    scratch: Path,
) -> "ConversionText":
    from molcli.data.tokenizer import open_tokenizer
    from molcli.fitting.calibration import open_calibration, split_text, text_hash
    from molcli.stages.convert import ConversionText

    size = source.config.vocab_size
    settings = recipe.calibrate
    if calibration is not None:
        found = open_calibration(calibration, parent)
        fit, heldout = found.fit, found.heldout
    else:
        if settings.data is None:
            if parent is None:
                raise MolError(
                    "there is no text to fit Gated DeltaNet to",
                    allowed="--data FILE, --calibration DIR, or a --parent to sample text from",
                )
            settings = with_sample(parent, recipe, scratch)
        fit, heldout = split_text(settings, open_tokenizer(source.folder), size)
    largest = max(int(rows.input_ids.max()) for rows in (fit, heldout))
    if largest >= size:
        raise MolError(
            f"the text has token {largest}, the model a vocabulary of {size}",
            allowed="text of the model's own vocabulary",
        )
    return ConversionText(fit, heldout, text_hash(fit, heldout))


def _with_layers(recipe: Recipe, text: str) -> Recipe:
    from molcli.config.layer_choice import parse_choice
    from molcli.config.ranges import validate

    chosen = replace(recipe.convert, gated_deltanet=parse_choice(text))
    recipe = replace(recipe, convert=chosen)
    validate(recipe)
    return recipe


def _show(out: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    found = json.loads((out / "convert.json").read_text(encoding="utf-8"))
    console = Console(highlight=False)
    names = {
        "delta_error_start": "delta error, fitted",
        "delta_error": "delta error",
        "residual_error": "residual error",
        "kl_alone": "KL alone",
    }
    table = Table(
        title="Converted layers on held-out tokens",
        caption="Relative squared errors towards the same layer with softmax attention.",
        box=SIMPLE_HEAD,
    )
    for name in ("layer", "kind", *names.values()):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for row in found["layers"]:
        figures = ("–" if row[name] is None else f"{row[name]:.4f}" for name in names)
        table.add_row(str(row["layer"]), row["kind"], *figures)
    if found["layers"]:
        console.print(table)
    if (heldout := found["heldout"]) is not None:
        console.print(
            f"Cross-entropy {heldout['ce']:.3f} nats a token, before {heldout['original_ce']:.3f}; "
            f"KL to the original {heldout['kl']:.3f}.\n"
        )
    console.print(f"checkpoint {escape(str(out))}", soft_wrap=True)
