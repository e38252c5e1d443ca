"""`molcli plan`: what shapes of a converted model would cost."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molcli.cli.bars import bar
from molcli.cli.options import Json, Overrides, Parent, RecipeName, recipe_for
from molcli.cli.upcycle import Calibration
from molcli.errors import MolError

if TYPE_CHECKING:  # torch and rich come with them
    from rich.table import Table

    from molcli.config.sections import Recipe
    from molcli.stages.plan import Plan

Active = Annotated[
    str,
    typer.Option(
        "--active", "-a", metavar="SHARE", help="Active parameters without embeddings, 50% or 0.5."
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option("--tokens", metavar="N", help="Training tokens, such as 30M; else the recipe's."),
]
GpuName = Annotated[
    str, typer.Option("--gpu", metavar="NAME", help="What time and memory are estimated for.")
]


def plan(
    parent: Parent,
    active: Active = "50%",
    tokens: Tokens = None,
    gpu: GpuName = "h100",
    calibration: Calibration = None,
    json_file: Json = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
) -> None:
    """Sizes, operations, memory and time of shapes, from the parent's configuration alone.

    With --calibration, the KL to the parent right after conversion, too, forecast from its weights.
    """
    settings = recipe_for(recipe, overrides)
    share = _share(active)
    budget = settings.train.tokens if tokens is None else parse_count(tokens)
    found = run_plan(parent, settings, share, budget, gpu, calibration)
    if json_file is not None:
        json_file.write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_table(found))
    best = next(c for c in found.candidates if c.name == found.recommended)
    keys = " ".join(f"--set upcycle.{key}={value}" for key, value in best.settings.items())
    console.print(f"{best.name}: molcli upcycle {parent} OUT {keys}", soft_wrap=True, markup=False)


def run_plan(
    parent: str, recipe: "Recipe", share: float, tokens: int, gpu: str, calibration: Path | None
) -> "Plan":
    """Reads the parent's weights only where there is a calibration."""
    from molcli.estimate.forecast import layer_spectra
    from molcli.estimate.time import GPUS
    from molcli.families.parent import open_parent, outline
    from molcli.fitting.shapes import converted_config
    from molcli.stages.plan import plan as make

    if gpu.lower() not in GPUS:
        raise MolError(f"--gpu is {gpu}", allowed=", ".join(GPUS), hint="--gpu h100")
    chosen = GPUS[gpu.lower()]
    if calibration is None:
        return make(outline(parent), recipe, share, tokens, chosen)
    from molcli.fitting.calibration import open_calibration

    dense = open_parent(parent)
    text = open_calibration(calibration, dense)
    structures = converted_config(dense.mol_config_kwargs(), recipe.upcycle).layer_structures
    layers = [i for i, structure in enumerate(structures) if structure != "dense"]
    spectra = {}
    with bar("spectra") as progress:
        for i, spectrum in layer_spectra(dense, text.moment, layers):
            spectra[i] = spectrum
            progress(len(spectra), len(layers))
    return make(outline(parent), recipe, share, tokens, chosen, spectra, text.fit.tokens)


def _share(text: str) -> float:
    number = text.removesuffix("%")
    try:
        share = float(number) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise MolError(f"--active is {text}", allowed="more than 0% to 100%", hint="--active 50%")
    return share


def parse_count(text: str) -> int:
    """A text such as 30M as a number. Raises MolError."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9}
    unit = units.get(text[-1:].upper(), 1)
    try:
        count = round(float(text[:-1] if unit > 1 else text) * unit)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise MolError(f"--tokens is {text}", allowed="a number such as 30M", hint="--tokens 30M")
    return count


def _table(found: "Plan") -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from molcli.stages.plan import PRESETS

    gpu = found.gpu
    table = Table(
        title=f"Parent: {found.parent_total / 1e6:,.1f}M parameters, "
        f"{found.parent_flops / 1e6:,.0f}M operations a token",
        caption="Shape: width×neurons, first of the shared block where it has its own. Share: "
        "active parameters without embeddings, of the parent's. Time and memory (GB) are estimates "
        f"for one {gpu.name} of {gpu.memory / 1e9:.0f} GB, training for {found.tokens:,} tokens.",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    forecast = found.candidates[0].kl is not None
    table.add_column("shape", no_wrap=True)
    names = ["total", "active", "share", "FLOPs", "convert", "train"]
    for name in (["KL"] if forecast else []) + names:
        table.add_column(name, justify="right", no_wrap=True)
    for c in found.candidates:
        name = f"{c.name}, {_shapes(c.settings)}" if c.name in PRESETS else c.name
        cells = [
            name if c.name != found.recommended else f"[bold]{name}[/bold]",
            _count_of(c.total),
            _count_of(c.active),
            f"{c.share:.0%}",
            f"{c.flops / found.parent_flops:.0%}",
            f"{_time(c.conversion.seconds)} {_memory(c.conversion.memory, gpu.memory)}",
            f"{_time(c.training.seconds)} {_memory(c.training.memory, gpu.memory)}",
        ]
        if c.kl is not None:
            cells.insert(1, f"{c.kl:.2f}")
        table.add_row(*cells)
    return table


def _shapes(settings: dict[str, Any]) -> str:
    wide = settings.get("d_thin_shared"), settings.get("d_ff_thin_shared")
    thin = settings["d_thin"], settings["d_ff_thin"]
    return ", ".join(f"{width}×{neurons}" for width, neurons in (wide, thin) if width)


def _memory(size: float, available: float) -> str:
    return _bytes(size) if size <= available else f"[red]{_bytes(size)}[/red]"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f}G" if size < 1e10 else f"{size / 1e9:,.0f}G"


def _count_of(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def _time(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.{int(seconds < 10 * size)}f}{unit}"
    return f"{seconds:.0f}s"
