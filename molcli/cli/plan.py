"""`molcli plan`: estimate what shapes of a converted model would cost."""

import shlex
from collections.abc import Sequence
from typing import Annotated

import typer

from molcli import api
from molcli.cli.figures import Json, check_json, write_json
from molcli.cli.options import Calibration, Overrides, Parent, RecipeName
from molcli.console import console, say
from molcli.errors import MolError

Active = Annotated[
    str,
    typer.Option(
        "--active",
        "-a",
        metavar="SHARE",
        help="Active parameters, embeddings left out, relative to the parent's: 50% or 0.5.",
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens", metavar="N", help="Training tokens, such as 30M, in place of the recipe's."
    ),
]
GpuName = Annotated[
    str,
    typer.Option("--gpu", metavar="NAME", help="The GPU that time and memory are estimated for."),
]

_MOST_TOKENS = 10**18


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
    """Estimate size, operations, memory and time of shapes from the parent's configuration alone.

    Nothing is run. With --calibration, the KL to the parent right after conversion is forecast,
    too, from the parent's weights and the statistics in that folder. The shapes are chosen here:
    --set changes other things, such as train.tokens or upcycle.layers.
    """
    check_json(json_file)
    _refuse_shapes(overrides or ())
    found = api.plan(
        parent,
        active=_parse_share(active),
        tokens=None if tokens is None else parse_count(tokens),
        gpu=gpu,
        calibration=calibration,
        recipe=recipe,
        settings=overrides or (),
    )
    from molcli.report.plan_table import plan_table

    best = next(c for c in found.candidates if c.name == found.recommended)
    console().print(plan_table(found))
    words = ["molcli", "upcycle", parent, "OUT"]
    for key, value in best.settings.items():
        words += ["--set", f"upcycle.{key}={value}"]
    say(f"{best.name}: {shlex.join(words)}")
    write_json(json_file, found.to_json())


def parse_count(text: str) -> int:
    """Return a number of tokens such as 30M. Raise MolError for anything else."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9}
    unit = units.get(text[-1:].upper(), 1)
    try:
        count = round(float(text[:-1] if unit > 1 else text) * unit)
    except (ValueError, OverflowError):
        count = 0
    if not 1 <= count <= _MOST_TOKENS:
        raise MolError(f"--tokens is {text}", allowed="a number such as 30M", hint="--tokens 30M")
    return count


def _parse_share(text: str) -> float:
    """Return 0.5 for 50% or 0.5. Raise MolError for anything that is not above 0 and at most 1."""
    number = text.removesuffix("%")
    try:
        share = float(number) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise MolError(f"--active is {text}", allowed="more than 0% to 100%", hint="--active 50%")
    return share


def _refuse_shapes(overrides: Sequence[str]) -> None:
    """Raise MolError for a setting of the command line that is not used here."""
    from molcli.config.sections import SHAPE_KEYS

    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in {f"upcycle.{name}" for name in (*SHAPE_KEYS, "preset")}:
            raise MolError(
                f"--set {key} has no effect: plan compares shapes of its own choice",
                allowed="--set for other things, such as upcycle.layers",
                hint="--active 50% for the size of the model",
            )
