"""The end of `molcli upcycle`: its receipt as tables, and what lies where."""

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from molcli.cli.tables import Figures, figures_table
from molcli.stages.upcycle.page import NAMES, STUDENT, layer_cells


def show_receipt(folder: Path) -> None:
    """Prints the receipt of a converted checkpoint."""
    receipt: dict[str, Any] = json.loads((folder / "receipt.json").read_text(encoding="utf-8"))
    console = Console(highlight=False)
    if receipt["heldout"] is not None:
        console.print(_layers(receipt["layers"]))
        console.print(_models(receipt))
        flops = receipt["flops"]
        console.print(
            f"{flops['active'] / 1e6:,.0f}M operations a token, the parent "
            f"{flops['parent'] / 1e6:,.0f}M, at {flops['context_length']:,} tokens of context.\n"
        )
    places = {"checkpoint": folder, "receipt": folder / "receipt.html"}
    for name, place in places.items():
        console.print(f"{name:<10} {escape(str(place))}", soft_wrap=True)


def _models(receipt: dict[str, Any]) -> Table:
    heldout, size = receipt["heldout"], receipt["parameters"]
    rows = {
        "parent": Figures(heldout["parent_ce"], 0.0, size["parent"], size["parent"]),
        STUDENT: Figures(heldout["ce"], heldout["kl"], size["total"], size["active"]),
    }
    for name, row in (receipt["baselines"] or {}).items():
        rows[NAMES[name]] = Figures(row["ce"], row["kl"], row["params_total"], row["params_active"])
    return figures_table(f"{heldout['tokens']:,} held-out tokens, nats a token", rows)


def _layers(rows: list[dict[str, Any]]) -> Table:
    """Layers up to which the student is the parent are left out, but for one."""
    table = Table(
        title="Layers on held-out tokens",
        caption="Errors are relative squared errors: 0 is the parent, 1 is no layer at all.",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    shown = [layer_cells(row) for row in rows if row["residual_error"] > 0 or row is rows[-1]]
    for name in shown[0]:
        table.add_column(name, justify="left" if name == "kind" else "right")
    for cells in shown:
        table.add_row(*cells.values())
    return table
