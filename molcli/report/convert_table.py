"""The table of `molcli convert`."""

import json
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from molcli.console import console, say


def show_conversion(out: Path) -> None:
    """Print the converted layers and the losses of `out`/convert.json."""
    found = json.loads((out / "convert.json").read_text(encoding="utf-8"))
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
        console().print(table)
    if (heldout := found["heldout"]) is not None:
        console().print(
            f"Cross-entropy {heldout['ce']:.3f} nats a token, before {heldout['original_ce']:.3f}; "
            f"KL to the original {heldout['kl']:.3f}.\n"
        )
    say(f"checkpoint {out}")
