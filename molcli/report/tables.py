"""Reports as rich tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from molcli.config.stages import Stage
from molcli.report.receipt_page import NAMES, STUDENT, layer_cells

if TYPE_CHECKING:  # stages import pages of this room, and torch comes with them
    from molcli.stages import bench
    from molcli.stages.evaluate import Evaluation, Report
    from molcli.stages.evaluate.recall import Recall
    from molcli.stages.evaluate.tasks import Scores
    from molcli.stages.inspect import LayerRouting, RoutingReport
    from molcli.stages.train.plan import Estimate


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


def bench_tables(report: bench.Report) -> Iterator[Table | str]:
    """One line per work, then how rows were routed and what measured it."""
    table = Table(box=SIMPLE_HEAD, title=f"{report.model}; dense: {report.dense}")
    table.add_column("work")
    for name in ("unit", "MoL", "peer", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in report.rows:
        ratio = "–" if row.ratio is None else f"{row.ratio:.2f}×"
        known = "" if row.peer_name == "dense" else f"peer: {row.peer_name}"
        note = "; ".join(part for part in (known, row.note) if part)
        table.add_row(row.work, row.unit, _figure(row.mol), _figure(row.peer), ratio, note)
    yield table
    for kind, (most, least) in report.loads.items():
        yield (
            f"Routing, {kind}: the busiest block has {most:.2f} times an even share of the tokens, "
            f"the least busy one {least:.2f} times."
        )
    yield ", ".join(f"{name} {value}" for name, value in report.machine.items())


def _figure(value: float | None) -> str:
    """Three digits that count; a dash where there is no figure."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


_KINDS = ("weights", "gradients", "optimizer", "activations", "parent", "logits", "total")


def stages_table(stages: list[Stage], title: str) -> Table:
    """One line per stage."""
    names = ("tokens", "context", "batch", "lr", "lr of new", "trains")
    table = _table(title, "stage", *names)
    for number, stage in enumerate(stages):
        s = stage.settings
        table.add_row(
            f"{number} {stage.kind}",
            f"{s.tokens:,}",
            f"{s.context_length:,}",
            f"{s.batch_size:,}",
            f"{s.learning_rate:.2g}",
            f"{s.new_learning_rate:.2g}",
            "mol" if stage.kind == "align" else s.trainable,
        )
    return table


def estimate_tables(estimate: Estimate) -> list[Table]:
    """Parameters and time, then memory by kind; a column per stage."""
    names = [f"{i} {stage.stage.kind}" for i, stage in enumerate(estimate.stages)]
    work = _table(f"On {estimate.device} (times: guesses)", "", *names)
    rows = {
        "parameters": [_millions(estimate.total)] * len(names),
        "active": [_millions(estimate.active)] * len(names),
        "trainable": [_millions(stage.trainable) for stage in estimate.stages],
        "FLOPs a token": [f"{stage.flops / 1e9:,.3g}G" for stage in estimate.stages],
        "steps": [f"{stage.steps:,}" for stage in estimate.stages],
        "tokens/s": [f"{stage.tokens_per_second:,.0f}" for stage in estimate.stages],
        "hours": [f"{stage.seconds / 3600:,.2g}" for stage in estimate.stages],
    }
    for name, cells in rows.items():
        work.add_row(name, *cells)
    room = estimate.device_memory
    has = "" if room is None else f" (of {room / 1e9:,.1f})"
    memory = _table(f"GB at a step's peak{has}", "", *names)
    for kind in _KINDS:
        cells = [f"{getattr(stage.memory, kind) / 1e9:,.3f}" for stage in estimate.stages]
        memory.add_row(kind, *cells)
    return [work, memory]


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M"


_ERROR = "_stderr"  # how lm-eval marks a metric's standard error


def report_tables(name: str, report: Report) -> list[Table]:
    """One table for each thing that was measured. name: the model's."""
    tables = []
    if report.heldout is not None:
        tables.append(_heldout(name, report.heldout))
    if report.heldout is not None and report.heldout.agreement is not None:
        tables.append(_agreement(report, report.heldout.agreement))
    if report.recall:
        tables.append(_recall(report.recall))
    if report.tasks:
        tables.append(_tasks(report.tasks))
    return tables


def _heldout(name: str, figures: Evaluation) -> Table:
    beside = parent_figures(figures)
    rows = {} if beside is None else {"parent": beside}
    title = f"{figures.tokens:,} held-out tokens, nats a token"
    return figures_table(title, rows | {name: figures_of(figures)})


def _agreement(report: Report, top_one: float) -> Table:
    table = Table("share of", "agree", title="Agreement with the parent", box=SIMPLE_HEAD)
    table.columns[1].justify = "right"
    table.add_row("tokens: the same next token ranks first", f"{top_one:.1%}")
    found = report.generation
    if found is not None:
        length = found.continuation_length
        table.caption = (
            f"{found.prompts} prompts of {found.prompt_length} tokens, greedy continuations of "
            f"{length}: the first {found.matching_tokens:.1f} tokens agree on average."
        )
        share = found.matching_tokens / length
        table.add_row("a continuation's tokens, before the first that differs", f"{share:.1%}")
        table.add_row("prompts: the whole continuation", f"{found.full_match:.1%}")
    return table


def _recall(found: list[Recall]) -> Table:
    table = Table(
        title="Recall: the value of a key read before",
        caption=(
            "Share of questions whose value leads all tokens, share in which it leads the values "
            "listed, and its median rank."
        ),
        box=SIMPLE_HEAD,
    )
    names = ["model"] if found[0].parent is None else ["model", "parent"]
    headings = [f"{figure}\n{name}" for figure in ("leads", "of listed", "rank") for name in names]
    for heading in ("filler\ntokens", *headings):
        table.add_column(heading, justify="right")
    for row in found:
        scores = [row.model] if row.parent is None else [row.model, row.parent]
        cells = [f"{score.accuracy:.0%}" for score in scores]
        cells += [f"{score.accuracy_among_values:.0%}" for score in scores]
        table.add_row(f"{row.distance:,}", *cells, *(f"{s.median_rank:,}" for s in scores))
    return table


def _tasks(scores: Scores) -> Table:
    names = list(
        dict.fromkeys(n for metrics in scores.values() for m in metrics.values() for n in m)
    )
    table = Table("task", "metric", title="lm-eval, ± standard error", box=SIMPLE_HEAD)
    for name in names:
        table.add_column(name, justify="right")
    for task, metrics in scores.items():
        for metric, values in metrics.items():
            if _ERROR not in metric:
                errors = metrics.get(_error_of(metric), {})
                table.add_row(task, metric, *(_value(values, errors, name) for name in names))
    return table


def _error_of(metric: str) -> str:
    """From "exact_match (strict)" to "exact_match_stderr (strict)", and so without a filter."""
    head, space, filtered_by = metric.partition(" ")
    return head + _ERROR + space + filtered_by


def _value(values: dict[str, float], errors: dict[str, float], name: str) -> str:
    if name not in values:
        return "–"
    return f"{values[name]:.4f}" + (f" ± {errors[name]:.4f}" if name in errors else "")


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
