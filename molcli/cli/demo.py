"""`molcli demo`: the whole path on a real model."""

from pathlib import Path
from typing import Annotated

import typer

from molcli.errors import MolError

DemoOut = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write; must not exist.")
]


def demo(out: DemoOut = Path("molcli-demo")) -> None:
    """Upcycle SmolLM2-135M, train it, and show its routing."""
    raise MolError(f"the demo is not written yet; nothing goes to {out}")
