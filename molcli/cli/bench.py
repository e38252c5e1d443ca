"""`molcli bench`: time a model beside a dense one, on this machine."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molcli.api.arguments import open_dense
from molcli.cli.figures import Json, check_json, show_figures, write_json
from molcli.cli.options import Overrides, RecipeName
from molcli.errors import MolError
from molcli.report.bars import bar

if TYPE_CHECKING:  # imports torch
    from collections.abc import Callable

    from molcli.stages.bench import Report

OptionalCheckpoint = Annotated[
    Path | None,
    typer.Argument(metavar="CKPT", help="The folder of a Mixture of Layers model."),
]
Peer = Annotated[
    str | None,
    typer.Option(
        "--parent",
        "-p",
        metavar="PARENT",
        help="The dense model to time beside it.",
    ),
]
Only = Annotated[
    str | None,
    typer.Option(
        "--only", metavar="A,B", help="Some of prefill, decode, train, grouped, gdn; else all."
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of tokens and random weights.")]
Compiled = Annotated[
    bool,
    typer.Option("--compile/--no-compile", help="On a GPU, compile for prefill and training."),
]


def bench(
    checkpoint: OptionalCheckpoint = None,
    parent: Peer = None,
    only: Only = None,
    json_file: Json = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
    seed: Seed = 0,
    compiled: Compiled = True,
) -> None:
    """Time a model beside its dense parent, or a Llama of its width: prefill, decoding, training.

    With --recipe in place of CKPT, an untrained model as its section `model` says. The dense model
    has random weights.
    """
    check_json(json_file)
    from molcli.report.benchmark import benchmark_tables

    def save(report: "Report") -> None:
        # A full disk does not stop the measurements; writing fails again after they are printed.
        with suppress(OSError):
            write_json(json_file, report.to_json())

    report = run_bench(checkpoint, parent, only, recipe, overrides, seed, compiled, save)
    show_figures(benchmark_tables(report), json_file, report.to_json())


def run_bench(
    checkpoint: Path | None,
    parent: str | None,
    only: str | None,
    recipe: str | None,
    overrides: list[str] | None,
    seed: int,
    compiled: bool,
    save: "Callable[[Report], None]" = lambda _: None,
) -> "Report":
    """Run the sections of `only`, or all. save: called with the report after each of its rows."""
    if (checkpoint is None) == (recipe is None):
        raise MolError(
            "there is nothing to time"
            if checkpoint is None
            else "--recipe comes with a checkpoint",
            allowed="a checkpoint, or --recipe for an untrained model",
            hint="molcli bench --recipe paper-1.3b-1+3of15",
        )
    if recipe is None and overrides:
        raise MolError(
            f"--set {overrides[0]} changes a recipe, and a checkpoint is timed as it is",
            allowed="--set with --recipe",
        )
    from molcli.config.recipe import load_model_recipe
    from molcli.model.checkpoint import default_device
    from molcli.stages.bench import SECTIONS, bench, open_benchmark_pair
    from molcli.stages.init import check_memory, untrained_config

    sections = SECTIONS if only is None else [name for name in only.split(",") if name]
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown or not sections:
        raise MolError(
            f"--only names {', '.join(unknown) or 'nothing'}", allowed=", ".join(SECTIONS)
        )
    hint = "molcli bench --recipe paper-80m-1+3of15"
    settings = None if recipe is None else load_model_recipe(recipe, overrides or (), hint)
    config = None if settings is None else untrained_config(settings.model)
    if config is not None:
        check_memory(config)
    dense = None if parent is None else open_dense(parent).config
    pair = open_benchmark_pair(config, checkpoint, dense, default_device())
    with bar("timing") as progress:
        return bench(pair, sections, seed=seed, compiled=compiled, progress=progress, save=save)
