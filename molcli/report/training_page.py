"""The log of a run as a page to read."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from molcli.config import yaml_text
from molcli.config.sections import TrainConfig
from molcli.report.charts import Point, heatmap, line_chart
from molcli.report.html import Markup, figure, heading, page, paragraph, table

Line = dict[str, Any]

POINTS = 240  # of a chart, however long the run
_CELLS, _COLUMNS = 1500, 60  # of a heatmap, at most
_TROUBLES = 12  # skipped steps that are listed
# Key of a line, what its curve is called, logarithmic, what to know about it.
_CURVES = (
    ("loss", "loss", True, "What is minimised, each stage in its own colour and units."),
    ("kl", "KL to parent, nats", True, "Forward KL a token, at temperature 1."),
    ("ce", "cross-entropy, nats", False, "Next-token loss."),
    ("balance", "CV² of loads", True, "0 is an even load; mean of layers."),
    ("learning_rate", "learning rate", False, "Of inherited weights."),
    ("gradient_norm", "gradient norm", True, "Before clipping, at each window's last step."),
    ("tokens_per_second", "tokens/s", False, "All devices together, checkpoints included."),
    ("mfu", "MFU", False, "Of active FLOPs, against the devices' dense bf16 peak."),
)


def train_page(lines: Sequence[Line], config: TrainConfig) -> str:
    """lines: of log.jsonl, in order (`TrainLog` says what one has). Self-contained HTML, of at most
    200 KB however many there are. config: the train section in force."""
    unit, name = _unit(lines[-1]["tokens"] if lines else 0)
    parts = [_summary(lines)]
    if lines:
        parts += _stages(lines)
        parts += _curves(lines, unit, name)
        parts += _routing(lines, name, unit)
        parts += _troubles(lines)
    recipe = table(("train",), [(yaml_text.dump(asdict(config)),)], prose=True)
    return page("Training", [*parts, heading("Recipe"), recipe])


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` of the points, in order: the lowest and the highest of equal stretches, so
    that no spike is lost. All of them if they are no more."""
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    for stretch in _split(points, max(1, most // 2)):
        heights = [y for _, y in stretch]
        ends = {heights.index(min(heights)), heights.index(max(heights))}
        kept += [stretch[i] for i in sorted(ends)]
    return kept


def _split(values: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """`parts` stretches of about the same length, fewer where there are fewer values."""
    parts = min(parts, len(values))
    bounds = [i * len(values) // parts for i in range(parts + 1)]
    return [values[a:b] for a, b in pairwise(bounds)]


def _summary(lines: Sequence[Line]) -> Markup:
    if not lines:
        return paragraph("No step has been logged.")
    last = lines[-1]
    skipped = f", {last['skipped']:,} of them skipped" if last["skipped"] else ""
    return paragraph(
        f"{last['step']:,} steps{skipped}, {last['tokens']:,} tokens in "
        f"{last['seconds'] / 3600:,.2f} hours, resumptions included."
    )


def _by_stage(lines: Sequence[Line]) -> dict[str, list[Line]]:
    stages: dict[str, list[Line]] = {}
    for line in lines:
        stages.setdefault(line["stage"], []).append(line)
    return stages


def _stages(lines: Sequence[Line]) -> list[Markup]:
    counters, rows = ("step", "tokens", "seconds"), []
    before: Line = dict.fromkeys(counters, 0)
    for name, own in _by_stage(lines).items():
        steps, tokens, seconds = (own[-1][key] - before[key] for key in counters)
        rate = tokens / seconds if seconds > 0 else math.nan
        ends = [_first_last(own, key) for key in ("loss", "kl", "ce")]
        rows.append((name, f"{steps:,}", f"{tokens:,}", *ends, f"{rate:,.0f}"))
        before = own[-1]
    names = ("stage", "steps", "tokens", "loss", "KL to parent", "cross-entropy", "tokens/s")
    return [heading("Stages"), table(names, rows), paragraph("First and last logged window.")]


def _first_last(lines: Sequence[Line], key: str) -> str:
    values = [line[key] for line in lines if line[key] is not None]
    return f"{values[0]:.3f} → {values[-1]:.3f}" if values else "–"


def _curves(lines: Sequence[Line], unit: float, unit_name: str) -> list[Markup]:
    parts = [heading("Curves")]
    for key, label, log, caption in _CURVES:
        series: dict[str, list[Point]] = {}
        for name, own in _by_stage(lines).items():
            points = [(line["tokens"] / unit, line[key]) for line in own if line[key] is not None]
            if points:
                series[name] = thinned(points, max(2, POINTS * len(own) // len(lines)))
        if series:
            chart = line_chart(series, x_label=f"{unit_name} of training", y_label=label, log=log)
            parts.append(figure(chart, caption))
    return parts


def _routing(lines: Sequence[Line], unit_name: str, unit: float) -> list[Markup]:
    routed = [line for line in lines if line["routing"]]
    if not routed:
        return []
    layers = list(routed[0]["routing"])
    columns = _split(routed, max(4, min(_COLUMNS, _CELLS // len(layers))))
    first, last = (line["tokens"] / unit for line in (routed[0], routed[-1]))
    charts = {
        "How far the most used block of each layer is above an even load, as a share of it.": [
            [_mean([line["routing"][layer][1] - 1 for line in c]) for c in columns]
            for layer in layers
        ],
        "How far the least used one is below it: 1 is a block that no token visits.": [
            [_mean([1 - line["routing"][layer][0] for line in c]) for c in columns]
            for layer in layers
        ],
    }
    x_label = f"{unit_name}, {first:.3g} to {last:.3g}"
    return [
        heading("Routing over time"),
        *(
            figure(
                heatmap(cells, row_labels=layers, x_label=x_label, y_label="layer"),
                caption,
            )
            for caption, cells in charts.items()
        ),
    ]


def _troubles(lines: Sequence[Line]) -> list[Markup]:
    rows = [(f"{line['step']:,}", line["not_finite"]) for line in lines if line["not_finite"]]
    if not rows:
        return []
    parts = [
        heading("Skipped steps"),
        table(("step", "first value that was not finite"), rows[:_TROUBLES], prose=True),
    ]
    if len(rows) > _TROUBLES:
        parts.append(paragraph(f"And {len(rows) - _TROUBLES:,} more in log.jsonl."))
    return parts


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _unit(tokens: int) -> tuple[float, str]:
    """What tokens are counted in."""
    for unit, name in ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens")):
        if tokens >= unit:
            return unit, name
    return 1.0, "tokens"
