"""The receipt as a page to read."""

import math
from typing import Any

from molcli.report.charts import bar_chart, heatmap, line_chart
from molcli.report.html import Markup, figure, heading, page, paragraph, table

NAMES = {
    "skipped": "layers skipped",
    "random": "random blocks",
    "svd": "weight SVD",
    "pca": "activation PCA",
    "depth_pruned": "depth-pruned parent",
}
"""What the baselines of a receipt are called."""
STUDENT = "this model"
LONGEST_BAR = 8


def receipt_page(receipt: dict[str, Any]) -> str:
    """receipt: as `molcli.stages.upcycle.report` writes it. Self-contained HTML."""
    converted = [row for row in receipt["layers"] if row["kind"] != "dense"]
    parts = [_summary(receipt, len(converted))]
    if receipt["heldout"] is not None:
        parts += _models(receipt)
        parts += _layers(receipt["layers"])
        parts += _routing(converted)
    if receipt["continuations"]:
        parts += _continuations(receipt["continuations"])
    return page("Conversion receipt", [*parts, *_provenance(receipt)])


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


def _models(receipt: dict[str, Any]) -> list[Markup]:
    heldout, size, flops = receipt["heldout"], receipt["parameters"], receipt["flops"]
    baselines: dict[str, dict[str, Any]] = receipt["baselines"] or {}
    rows = [
        ("parent", heldout["parent_ce"], 0.0, size["parent"], size["parent"]),
        (STUDENT, heldout["ce"], heldout["kl"], size["total"], size["active"]),
        *(
            (NAMES[name], row["ce"], row["kl"], row["params_total"], row["params_active"])
            for name, row in baselines.items()
        ),
    ]
    parts = [
        heading("Held-out loss"),
        table(
            ("model", "cross-entropy", "KL to parent", "parameters", "active"),
            [
                (name, f"{ce:.3f}", f"{kl:.3f}", f"{total / 1e6:,.1f}M", f"{active / 1e6:,.1f}M")
                for name, ce, kl, total, active in rows
            ],
        ),
        paragraph(
            f"Nats a token. Operations a token at {flops['context_length']:,} tokens of context: "
            f"{flops['active'] / 1e6:,.0f}M active, {flops['total'] / 1e6:,.0f}M if every block "
            f"ran, the parent {flops['parent'] / 1e6:,.0f}M."
        ),
    ]
    if baselines:
        bars = {name: ce for name, ce, *_ in rows}
        # Skipping every layer costs a hundred nats: the others would be too short to compare.
        log = max(bars.values()) > LONGEST_BAR * min(bars.values())
        chart = bar_chart(bars, label="cross-entropy, nats a token", highlight=STUDENT, log=log)
        parts.append(figure(chart, "Shorter is better."))
    return parts


def _layers(rows: list[dict[str, Any]]) -> list[Markup]:
    names = {"delta_error": "what the layer adds", "residual_error": "the residual after it"}
    errors = {
        name: [(row["layer"], row[key]) for row in rows if row[key]] for key, name in names.items()
    }
    parts = [
        heading("Layers"),
        figure(
            line_chart(errors, x_label="layer", y_label="relative squared error", log=True),
            "Against the parent, on held-out tokens. 1 is what leaving the layer out costs.",
        ),
    ]
    if any("sensitivity" in row for row in rows):
        costs = [(row["layer"], row["sensitivity"]) for row in rows if "sensitivity" in row]
        chart = line_chart(
            {"sensitivity": costs}, x_label="layer", y_label="KL to parent, nats", log=True
        )
        parts.append(figure(chart, "The parent with this layer alone converted."))
    cells = [layer_cells(row) for row in rows]
    return [*parts, table(list(cells[0]), [list(row.values()) for row in cells])]


def layer_cells(row: dict[str, Any]) -> dict[str, str]:
    """One layer of a receipt as text, by column; ranges are over families or blocks."""
    routing = row.get("routing") or {}
    return {
        "layer": str(row["layer"]),
        "kind": row["kind"].removeprefix("gated_"),
        "energy kept": _range(row.get("retained_energy", []), "{:.1%}"),
        "delta error": f"{row['delta_error']:.3f}",
        "norm ratio": f"{row['norm_ratio']:.3f}",
        "residual error": f"{row['residual_error']:.3f}",
        "load share": _range(routing.get("load_share", []), "{:.1%}"),
        "margin": _number(routing.get("margin")),
        "sensitivity": _number(row.get("sensitivity")),
    }


def _routing(rows: list[dict[str, Any]]) -> list[Markup]:
    routed = [row for row in rows if row.get("routing")]
    if not routed:
        return []
    labels = [str(row["layer"]) for row in routed]
    charts = {
        "Share of its layer's visits that each routed block has. Even rows are a balanced load.": [
            row["routing"]["load_share"] for row in routed
        ],
        "Error of what the layer adds, over the tokens that each block sees.": [
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


def _continuations(samples: list[dict[str, str]]) -> list[Markup]:
    rows = [(sample["prompt"], sample["parent"], sample["model"]) for sample in samples]
    return [
        heading("Greedy continuations"),
        table(("held-out text", "parent", STUDENT), rows, prose=True),
    ]


def _provenance(receipt: dict[str, Any]) -> list[Markup]:
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


def _range(values: list[float], form: str) -> str:
    if not values:
        return "–"
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}–{high}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
