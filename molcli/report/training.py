"""A training run: the HTML page of its log, and terminal tables of its planned stages and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from molcli.config import yaml_text
from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage
from molcli.report.charts import Point, heatmap, line_chart
from molcli.report.html import Markup, figure, heading, page, paragraph, table
from molcli.report.tables import MISSING, millions, new_table

if TYPE_CHECKING:  # stages import this room, so it must not import them
    from rich.table import Table

    from molcli.stages.train.plan import Estimate

Line = dict[str, Any]

MAX_POINTS = 240  # of a chart, for a run of any length
_MAX_CELLS, _MAX_COLUMNS = 1500, 60  # of a heatmap
_MAX_SKIPPED = 12  # listed steps
# Key in the log, name of the curve, logarithmic axis, caption.
_CURVES = (
    ("loss", "loss", True, "The minimised loss: stages differ in their losses and units."),
    ("kl", "KL to parent, nats", True, "Forward KL per token, at temperature 1."),
    ("ce", "cross-entropy, nats", False, "Next-token loss."),
    ("balance", "CV² of loads", True, "0 is an even load; mean over layers."),
    ("learning_rate", "learning rate", False, "Of inherited weights."),
    ("gradient_norm", "gradient norm", True, "Before clipping, at the last step of each window."),
    (
        "tokens_per_second",
        "tokens/s",
        False,
        "All devices together, including time for checkpoints.",
    ),
    ("mfu", "MFU", False, "FLOPs of active parameters, relative to the devices' dense bf16 peak."),
)
_MEMORY_KINDS = ("weights", "gradients", "optimizer", "activations", "parent", "logits", "total")


def training_page(lines: Sequence[Line], config: TrainConfig) -> str:
    """Build a self-contained HTML page of at most 200 KB.

    Args:
        lines: Of log.jsonl, in order; `TrainLog` documents their fields.
        config: The run's train section.
    """
    unit, unit_name = _token_unit(lines[-1]["tokens"] if lines else 0)
    parts = [_summary(lines)]
    if lines:
        parts += _stages_section(lines)
        parts += _curves_section(lines, unit, unit_name)
        parts += _routing_section(lines, unit, unit_name)
        parts += _skipped_section(lines)
    recipe = table(("train",), [(yaml_text.dump(asdict(config)),)], prose=True)
    return page("Training", [*parts, heading("Recipe"), recipe])


def stages_table(stages: list[Stage], title: str) -> Table:
    """Build a table with the settings of each stage, one line per stage."""
    columns = ("stage", "tokens", "context", "batch", "repeats", "lr", "lr of new", "trains")
    rows = new_table(title, columns, text=("stage",), no_wrap=True)
    for number, stage in enumerate(stages):
        s = stage.settings
        rows.add_row(
            f"{number} {stage.kind}",
            f"{s.tokens:,}",
            f"{s.context_length:,}",
            f"{s.batch_size:,}",
            f"{stage.repeats:.0%}",
            f"{s.learning_rate:.2g}",
            f"{s.new_learning_rate:.2g}",
            "mol" if stage.kind == "align" else s.trainable,
        )
    return rows


def estimate_tables(estimate: Estimate) -> list[Table]:
    """Build a table of parameters and time, and one of memory; each has a column per stage."""
    columns = ["", *(f"{i} {stage.stage.kind}" for i, stage in enumerate(estimate.stages))]
    work = new_table(f"On {estimate.device} (times: guesses)", columns, text=("",), no_wrap=True)
    rows = {
        "parameters": [millions(estimate.total)] * len(estimate.stages),
        "active": [millions(estimate.active)] * len(estimate.stages),
        "trainable": [millions(stage.trainable) for stage in estimate.stages],
        "repeats": [f"{stage.stage.repeats:.0%} of rows" for stage in estimate.stages],
        "FLOPs a token": [f"{stage.flops / 1e9:,.3g}G" for stage in estimate.stages],
        "steps": [f"{stage.steps:,}" for stage in estimate.stages],
        "tokens/s": [f"{stage.tokens_per_second:,.0f}" for stage in estimate.stages],
        "hours": [f"{stage.seconds / 3600:,.2g}" for stage in estimate.stages],
    }
    for name, cells in rows.items():
        work.add_row(name, *cells)
    available = estimate.device_memory
    of_available = "" if available is None else f" (of {available / 1e9:,.1f})"
    memory = new_table(f"GB at a step's peak{of_available}", columns, text=("",), no_wrap=True)
    for kind in _MEMORY_KINDS:
        cells = [f"{getattr(stage.memory, kind) / 1e9:,.3f}" for stage in estimate.stages]
        memory.add_row(kind, *cells)
    return [work, memory]


def downsample(points: Sequence[Point], max_points: int) -> list[Point]:
    """Reduce a curve to at most `max_points` points, in order, without losing spikes.

    Keeps the lowest and the highest point of equal segments; all points if there are few enough.
    """
    if len(points) <= max_points:
        return list(points)
    kept: list[Point] = []
    for segment in _split(points, max(1, max_points // 2)):
        heights = [y for _, y in segment]
        extremes = {heights.index(min(heights)), heights.index(max(heights))}
        kept += [segment[i] for i in sorted(extremes)]
    return kept


def _summary(lines: Sequence[Line]) -> Markup:
    if not lines:
        return paragraph("No step has been logged.")
    last = lines[-1]
    skipped = f", {last['skipped']:,} of them skipped" if last["skipped"] else ""
    return paragraph(
        f"{last['step']:,} steps{skipped}, {last['tokens']:,} tokens in "
        f"{last['seconds'] / 3600:,.2f} hours, resumed runs included."
    )


def _stages_section(lines: Sequence[Line]) -> list[Markup]:
    counters, rows = ("step", "tokens", "seconds"), []
    before: Line = dict.fromkeys(counters, 0)
    for name, own in _by_stage(lines).items():
        steps, tokens, seconds = (own[-1][key] - before[key] for key in counters)
        rate = tokens / seconds if seconds > 0 else math.nan
        changes = [_first_to_last(own, key) for key in ("loss", "kl", "ce")]
        rows.append((name, f"{steps:,}", f"{tokens:,}", *changes, f"{rate:,.0f}"))
        before = own[-1]
    names = ("stage", "steps", "tokens", "loss", "KL to parent", "cross-entropy", "tokens/s")
    return [heading("Stages"), table(names, rows), paragraph("First and last logged window.")]


def _curves_section(lines: Sequence[Line], unit: float, unit_name: str) -> list[Markup]:
    parts = [heading("Curves")]
    for key, label, log, caption in _CURVES:
        series: dict[str, list[Point]] = {}
        for name, own in _by_stage(lines).items():
            points = [(line["tokens"] / unit, line[key]) for line in own if line[key] is not None]
            if points:
                series[name] = downsample(points, max(2, MAX_POINTS * len(own) // len(lines)))
        if series:
            chart = line_chart(series, x_label=f"{unit_name} of training", y_label=label, log=log)
            parts.append(figure(chart, caption))
    return parts


def _routing_section(lines: Sequence[Line], unit: float, unit_name: str) -> list[Markup]:
    routed = [line for line in lines if line["routing"]]
    if not routed:
        return []
    layers = list(routed[0]["routing"])
    columns = _split(routed, max(4, min(_MAX_COLUMNS, _MAX_CELLS // len(layers))))
    first, last = (line["tokens"] / unit for line in (routed[0], routed[-1]))
    charts = {
        "Load of the most used block of each layer, relative to an even load, minus 1.": [
            [_mean([line["routing"][layer][1] - 1 for line in c]) for c in columns]
            for layer in layers
        ],
        "1 minus the load of the least used block, relative to an even load: 1 is a block that no "
        "token visits.": [
            [_mean([1 - line["routing"][layer][0] for line in c]) for c in columns]
            for layer in layers
        ],
    }
    x_label = f"{unit_name}, {first:.3g} to {last:.3g}"
    return [
        heading("Routing over time"),
        *(
            figure(heatmap(cells, row_labels=layers, x_label=x_label, y_label="layer"), caption)
            for caption, cells in charts.items()
        ),
    ]


def _skipped_section(lines: Sequence[Line]) -> list[Markup]:
    rows = [(f"{line['step']:,}", line["not_finite"]) for line in lines if line["not_finite"]]
    if not rows:
        return []
    parts = [
        heading("Values that are not finite"),
        table(("step", "first value that was not finite"), rows[:_MAX_SKIPPED], prose=True),
    ]
    if len(rows) > _MAX_SKIPPED:
        parts.append(paragraph(f"And {len(rows) - _MAX_SKIPPED:,} more in log.jsonl."))
    return parts


def _by_stage(lines: Sequence[Line]) -> dict[str, list[Line]]:
    stages: dict[str, list[Line]] = {}
    for line in lines:
        stages.setdefault(line["stage"], []).append(line)
    return stages


def _first_to_last(lines: Sequence[Line], key: str) -> str:
    values = [line[key] for line in lines if line[key] is not None]
    return f"{values[0]:.3f} → {values[-1]:.3f}" if values else MISSING


def _split(values: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Split into `parts` segments of nearly equal length, fewer if there are fewer values."""
    parts = min(parts, len(values))
    bounds = [i * len(values) // parts for i in range(parts + 1)]
    return [values[a:b] for a, b in pairwise(bounds)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _token_unit(tokens: int) -> tuple[float, str]:
    """Largest unit that is not above `tokens`, and its name."""
    for unit, name in ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens")):
        if tokens >= unit:
            return unit, name
    return 1.0, "tokens"
