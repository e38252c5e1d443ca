"""Table of `molcli inspect`: how each layer routes tokens to its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from molcli.report.tables import MISSING, new_table

if TYPE_CHECKING:  # stages import this room, so it must not import them
    from rich.table import Table

    from molcli.stages.inspect import LayerRouting, RoutingReport

_COLUMNS = ("layer", "mixer", "load share", "entropy", "dead", "mean weight", "mean gap", "p95 gap")


def routing_table(report: RoutingReport) -> Table:
    """Build a table with one line per layer and ranges over its blocks.

    The JSON report has the figures of every block.
    """
    even_gap = report.num_routed_blocks / report.top_k
    table = new_table(
        f"Routing over {report.tokens:,} tokens",
        _COLUMNS,
        text=("mixer",),
        caption=(
            f"{report.top_k} of {report.num_routed_blocks} routed blocks, "
            f"{report.num_shared_blocks} shared. Even routing: load share "
            f"{1 / report.num_routed_blocks:.1%}, entropy 1, mean gap {even_gap:.1f} tokens."
        ),
        compact=True,
    )
    for layer in report.layers:
        table.add_row(*_cells(layer))
    return table


def _cells(layer: LayerRouting) -> list[str | Text]:
    summary = layer.summary
    dead = len(summary.dead_blocks)
    weights = [weight for weight in summary.mean_weight if weight is not None]
    return [
        str(layer.layer),
        layer.mixer.removeprefix("gated_"),
        f"{100 * min(summary.load_share):.1f}–{max(summary.load_share):.1%}",
        f"{summary.entropy:.3f}",
        Text(str(dead), style="red" if dead else ""),
        f"{min(weights):.2f}–{max(weights):.2f}",
        MISSING if summary.layer_mean_gap is None else f"{summary.layer_mean_gap:.1f}",
        MISSING if summary.layer_p95_gap is None else str(summary.layer_p95_gap),
    ]
