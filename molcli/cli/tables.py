"""Reports as rich tables."""

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from molcli.stages.evaluate import Evaluation
from molcli.stages.inspect import LayerRouting, RoutingReport


@dataclass(frozen=True)
class Figures:
    """A model on held-out text. ce, kl: nats a token; kl is to the parent, None where unknown."""

    ce: float
    kl: float | None
    params_total: int
    params_active: int


def figures_of(evaluation: Evaluation) -> Figures:
    """The evaluated model's row."""
    return Figures(evaluation.ce, evaluation.kl, evaluation.params_total, evaluation.params_active)


def parent_figures(evaluation: Evaluation) -> Figures | None:
    """The parent's row, if there was one."""
    if evaluation.parent_ce is None or evaluation.parent_params is None:
        return None
    return Figures(evaluation.parent_ce, 0.0, evaluation.parent_params, evaluation.parent_params)


def figures_table(title: str, rows: dict[str, Figures]) -> Table:
    """One line per model, under the name given."""
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("model")
    for name in ("cross-entropy", "KL to parent", "parameters", "active"):
        table.add_column(name, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row.ce:.3f}",
            "–" if row.kl is None else f"{row.kl:.3f}",
            f"{row.params_total / 1e6:,.1f}M",
            f"{row.params_active / 1e6:,.1f}M",
        )
    return table


def routing_table(report: RoutingReport) -> Table:
    """One line per layer, ranges over its blocks; the JSON report has every block's figures."""
    even = report.num_routed_blocks / report.top_k
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"Routing over {report.tokens:,} tokens",
        caption=(
            f"{report.top_k} of {report.num_routed_blocks} routed blocks, "
            f"{report.num_shared_blocks} shared. Even routing: load share "
            f"{1 / report.num_routed_blocks:.1%}, entropy 1, mean gap {even:.1f} tokens."
        ),
    )
    table.add_column("layer", justify="right")
    table.add_column("mixer")
    for name in ("load share", "entropy", "dead", "mean weight", "mean gap", "p95 gap"):
        table.add_column(name, justify="right")
    for layer in report.layers:
        table.add_row(*_cells(layer))
    return table


def _cells(layer: LayerRouting) -> list[str]:
    figures = layer.summary
    dead = len(figures.dead_blocks)
    weights = [weight for weight in figures.mean_weight if weight is not None]
    return [
        str(layer.layer),
        layer.mixer.removeprefix("gated_"),
        f"{100 * min(figures.load_share):.1f}–{max(figures.load_share):.1%}",
        f"{figures.entropy:.3f}",
        f"[red]{dead}[/red]" if dead else "0",
        f"{min(weights):.2f}–{max(weights):.2f}",
        "–" if figures.layer_mean_gap is None else f"{figures.layer_mean_gap:.1f}",
        "–" if figures.layer_p95_gap is None else str(figures.layer_p95_gap),
    ]
