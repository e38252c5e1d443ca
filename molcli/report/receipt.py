"""The receipt of a conversion, as an HTML page and as terminal tables of `molcli upcycle`."""

import json
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from molcli.console import console, say
from molcli.report.charts import bar_chart, heatmap, line_chart
from molcli.report.html import Markup, figure, heading, page, paragraph, table
from molcli.report.tables import MISSING, ModelFigures, millions, model_table, new_table

BASELINE_NAMES = {
    "skipped": "layers skipped",
    "random": "random blocks",
    "svd": "weight SVD",
    "pca": "activation PCA",
    "depth_pruned": "depth-pruned parent",
}
"""Key of a baseline in the receipt -> its name in reports."""
STUDENT = "this model"
_MAX_LINEAR_RATIO = 8  # of the longest bar to the shortest; beyond it the scale is logarithmic


def receipt_page(receipt: dict[str, Any]) -> str:
    """Build a self-contained HTML page.

    Args:
        receipt: Content of receipt.json, as `molcli.stages.upcycle.report` builds it.
    """
    converted = [row for row in receipt["layers"] if row["kind"] != "dense"]
    parts = [_summary(receipt, len(converted))]
    if receipt["heldout"] is not None:
        parts += _loss_section(receipt)
        parts += _layers_section(receipt["layers"])
        parts += _routing_section(converted)
    if receipt["continuations"]:
        parts += _continuations_section(receipt["continuations"])
    return page("Conversion receipt", [*parts, *_provenance_section(receipt)])


def print_receipt(folder: Path) -> None:
    """Print the receipt of a converted checkpoint."""
    receipt: dict[str, Any] = json.loads((folder / "receipt.json").read_text(encoding="utf-8"))
    out = console()
    if receipt["heldout"] is not None:
        out.print(_layer_table(receipt["layers"]))
        tokens = receipt["heldout"]["tokens"]
        title = f"{tokens:,} held-out tokens, nats a token"
        out.print(model_table(title, _model_figures(receipt)))
        flops = receipt["flops"]
        out.print(
            f"{flops['active'] / 1e6:,.0f}M operations a token, the parent "
            f"{flops['parent'] / 1e6:,.0f}M, at {flops['context_length']:,} tokens of context.\n"
        )
    paths = {"checkpoint": folder, "receipt": folder / "receipt.html"}
    for name, path in paths.items():
        say(f"{name:<10} {path}")


def _summary(receipt: dict[str, Any], converted: int) -> Markup:
    heldout = receipt["heldout"]
    loss = (
        ""
        if heldout is None
        else f" On {heldout['tokens']:,} held-out tokens it loses "
        f"{heldout['ce'] - heldout['parent_ce']:.3f} nats of cross-entropy, before any training."
    )
    return paragraph(
        f"{receipt['parent']['name']}: {converted} of {len(receipt['layers'])} layers became "
        f"Mixture of Layers layers (method: {receipt['method']}).{loss}"
    )


def _loss_section(receipt: dict[str, Any]) -> list[Markup]:
    rows, flops = _model_figures(receipt), receipt["flops"]
    parts = [
        heading("Held-out loss"),
        table(
            ("model", "cross-entropy", "KL to parent", "parameters", "active"),
            [
                (
                    name,
                    f"{row.ce:.3f}",
                    f"{row.kl:.3f}",
                    millions(row.params_total),
                    millions(row.params_active),
                )
                for name, row in rows.items()
            ],
        ),
        paragraph(
            f"Nats a token. Operations a token at {flops['context_length']:,} tokens of context: "
            f"{flops['active'] / 1e6:,.0f}M active, {flops['total'] / 1e6:,.0f}M if every block "
            f"ran, the parent {flops['parent'] / 1e6:,.0f}M."
        ),
    ]
    if receipt["baselines"]:
        bars = {name: row.ce for name, row in rows.items()}
        # Skipping every layer costs a hundred nats: on a linear scale, the other bars would be too
        # short to compare.
        log = max(bars.values()) > _MAX_LINEAR_RATIO * min(bars.values())
        chart = bar_chart(bars, label="cross-entropy, nats a token", highlight=STUDENT, log=log)
        parts.append(figure(chart, "Shorter is better."))
    return parts


def _layers_section(rows: list[dict[str, Any]]) -> list[Markup]:
    names = {"delta_error": "what the layer adds", "residual_error": "the residual after it"}
    errors = {
        name: [(row["layer"], row[key]) for row in rows if row[key]] for key, name in names.items()
    }
    parts = [
        heading("Layers"),
        figure(
            line_chart(errors, x_label="layer", y_label="relative squared error", log=True),
            "Against the parent, on held-out tokens. 1 is the error of omitting the layer.",
        ),
    ]
    if any("sensitivity" in row for row in rows):
        costs = [(row["layer"], row["sensitivity"]) for row in rows if "sensitivity" in row]
        chart = line_chart(
            {"sensitivity": costs}, x_label="layer", y_label="KL to parent, nats", log=True
        )
        parts.append(figure(chart, "The parent with only this layer converted."))
    cells = [_layer_cells(row) for row in rows]
    return [*parts, table(list(cells[0]), [list(row.values()) for row in cells])]


def _routing_section(rows: list[dict[str, Any]]) -> list[Markup]:
    routed = [row for row in rows if row.get("routing")]
    if not routed:
        return []
    labels = [str(row["layer"]) for row in routed]
    charts = {
        "Load of each routed block: its fraction of the layer's routed tokens. An even row is a "
        "balanced load.": [row["routing"]["load_share"] for row in routed],
        "Error of what the layer adds, over the tokens routed to each block.": [
            [math.nan if x is None else x for x in row["routing"]["delta_error"]] for row in routed
        ],
    }
    return [
        heading("Routing"),
        *(
            figure(heatmap(cells, row_labels=labels, x_label="block", y_label="layer"), caption)
            for caption, cells in charts.items()
        ),
    ]


def _continuations_section(samples: list[dict[str, str]]) -> list[Markup]:
    rows = [(sample["prompt"], sample["parent"], sample["model"]) for sample in samples]
    return [
        heading("Greedy continuations"),
        table(("held-out text", "parent", STUDENT), rows, prose=True),
    ]


def _provenance_section(receipt: dict[str, Any]) -> list[Markup]:
    calibration = receipt["calibration"]
    facts = {
        "parent": receipt["parent"]["fingerprint"],
        "data": "none" if calibration is None else calibration["data"],
        "tokens": "0" if calibration is None else f"{calibration['tokens']:,}",
        "seed": str(receipt["seed"]),
        "time": f"{receipt['seconds']:,.1f} s on {receipt['device']}",
        "versions": ", ".join(f"{name} {x}" for name, x in receipt["versions"].items()),
    }
    return [heading("Provenance"), table(("what", "value"), list(facts.items()), prose=True)]


def _layer_table(rows: list[dict[str, Any]]) -> Table:
    """Omits the first layers, which equal the parent's; keeps at least the last layer."""
    shown = [_layer_cells(row) for row in rows if row["residual_error"] > 0 or row is rows[-1]]
    table = new_table(
        "Layers on held-out tokens",
        list(shown[0]),
        text=("kind",),
        caption="Errors are relative squared errors: 0 equals the parent, 1 omits the layer.",
        compact=True,
    )
    for cells in shown:
        table.add_row(*cells.values())
    return table


def _model_figures(receipt: dict[str, Any]) -> dict[str, ModelFigures]:
    """Figures of the parent, this model and the baselines, by name."""
    heldout, size = receipt["heldout"], receipt["parameters"]
    rows = {
        "parent": ModelFigures(heldout["parent_ce"], 0.0, size["parent"], size["parent"]),
        STUDENT: ModelFigures(heldout["ce"], heldout["kl"], size["total"], size["active"]),
    }
    for name, row in (receipt["baselines"] or {}).items():
        figures = ModelFigures(row["ce"], row["kl"], row["params_total"], row["params_active"])
        rows[BASELINE_NAMES[name]] = figures
    return rows


def _layer_cells(row: dict[str, Any]) -> dict[str, str]:
    """One layer as text by column; ranges are over families of blocks, or over blocks."""
    routing = row.get("routing") or {}
    return {
        "layer": str(row["layer"]),
        "kind": row["kind"].removeprefix("gated_"),
        "energy kept": _range(row.get("retained_energy", []), "{:.1%}"),
        "delta error": f"{row['delta_error']:.3f}",
        "norm ratio": "–" if row["norm_ratio"] is None else f"{row['norm_ratio']:.3f}",
        "residual error": f"{row['residual_error']:.3f}",
        "load share": _range(routing.get("load_share", []), "{:.1%}"),
        "margin": _number(routing.get("margin")),
        "sensitivity": _number(row.get("sensitivity")),
    }


def _range(values: list[float], form: str) -> str:
    if not values:
        return MISSING
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}–{high}"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"
