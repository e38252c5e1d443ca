"""Charts as inline SVG: lines, horizontal bars, heatmaps; and the axes they are drawn on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from molcli.report.html import Markup, escape

COLOURS = 6  # defined by the page's style
_WIDTH, _HEIGHT = 720, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 28, 44
_LEVELS = 16  # shades of a heatmap

Point = tuple[float, float]


def line_chart(
    series: Mapping[str, Sequence[Point]], *, x_label: str, y_label: str, log: bool = False
) -> Markup:
    """Draw one line per series, with a legend above.

    Points that are not finite, or not positive on a logarithmic axis, are omitted.

    Args:
        series: Name -> (x, y) points.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
        log: Use a logarithmic y axis.
    """
    shown = {
        name: [p for p in points if math.isfinite(p[0]) and _drawable(p[1], log)]
        for name, points in series.items()
    }
    points = [point for line in shown.values() for point in line]
    x_values, y_values = [p[0] for p in points], [p[1] for p in points]
    whole = all(x == int(x) for x in x_values)  # layers or steps: no ticks between them
    x_axis = linear_axis(x_values, _LEFT, _WIDTH - _RIGHT, from_zero=False, whole=whole)
    y_axis = (
        log_axis(y_values, _HEIGHT - _BOTTOM, _TOP)
        if log
        else linear_axis(y_values, _HEIGHT - _BOTTOM, _TOP)
    )
    parts = _frame(x_axis, y_axis, x_label, y_label)
    for i, (name, line) in enumerate(shown.items()):
        colour = f"var(--c{i % COLOURS})"
        places = [f"{_px(x_axis.at(x))},{_px(y_axis.at(y))}" for x, y in line]
        parts.append(
            f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" '
            'stroke-width="1.8"/>'
        )
        if len(line) <= 64:  # dots would clutter a longer curve
            dots = "".join(f"M{place}h0" for place in places)
            parts.append(
                f'<path d="{dots}" stroke="{colour}" stroke-width="5" stroke-linecap="round"/>'
            )
        x = _LEFT + 8 + i * (_WIDTH - _LEFT) // max(len(shown), 1)
        parts.append(f'<rect x="{x}" y="7" width="12" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="14">{escape(name)}</text>')
    return _svg(parts, _WIDTH, _HEIGHT, f"{y_label} by {x_label}")


def bar_chart(
    bars: Mapping[str, float], *, label: str, highlight: str = "", log: bool = False
) -> Markup:
    """Draw horizontal bars with their values beside them.

    Args:
        bars: Name -> value, not negative. A value that is not finite gets no bar, only its text.
        label: Label of the axis.
        highlight: Name of the bar drawn in another colour.
        log: Use a logarithmic axis.
    """
    left, step, right = 150, 26, 64
    height = len(bars) * step + _BOTTOM
    finite = [value for value in bars.values() if _drawable(value, log)]
    ends = left, _WIDTH - right
    axis = log_axis(finite, *ends) if log else linear_axis(finite, *ends)
    parts = _x_ticks(axis, 4, height - _BOTTOM + 4, label + (" (log scale)" if log else ""))
    for i, (name, value) in enumerate(bars.items()):
        y = 8 + i * step
        end = axis.at(value) if _drawable(value, log) else float(left)
        parts.append(
            f'<rect x="{left}" y="{y}" width="{_px(max(0.0, end - left))}" height="{step - 9}" '
            f'fill="var(--c{1 if name == highlight else 0})"/>'
        )
        parts.append(
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>'
            f'<text x="{_px(end + 6)}" y="{y + 13}">{escape(f"{value:.3g}")}</text>'
        )
    return _svg(parts, _WIDTH, height, label)


def heatmap(
    rows: Sequence[Sequence[float]], *, row_labels: Sequence[str], x_label: str, y_label: str
) -> Markup:
    """Draw one cell per value, darker for larger values; values up to 0 are blank.

    The scale ends at the largest value, which the label states. All cells of one of the 16 shades
    are one SVG path, which keeps a page with thousands of cells small.

    Args:
        rows: May differ in length.
        row_labels: One per row; some are omitted where rows are too low for text.
        x_label: Label of the columns.
        y_label: Label of the rows.
    """
    columns = max((len(row) for row in rows), default=0)
    top = max((v for row in rows for v in row if math.isfinite(v)), default=0.0)
    width = min(28.0, (_WIDTH - _LEFT - _RIGHT) / max(columns, 1))
    height = min(18.0, max(6.0, width))
    shades: dict[int, list[str]] = {}
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            level = _shade(value, top)
            cell = f"M{_px(_LEFT + j * width)} {_px(_TOP + i * height)}"
            shades.setdefault(level, []).append(
                f"{cell}h{_px(width - 1)}v{_px(height - 1)}h-{_px(width - 1)}z"
            )
    parts = [
        f'<path d="{"".join(cells)}" fill="var(--c0)" fill-opacity="{level / _LEVELS:.3g}"/>'
        for level, cells in sorted(shades.items())
        if level
    ]
    every = max(1, math.ceil(12 / height))  # labels must not overlap
    for i, name in enumerate(row_labels[: len(rows)]):
        if i % every == 0:
            y = _TOP + (i + 0.5) * height + 4
            parts.append(
                f'<text x="{_LEFT - 8}" y="{_px(y)}" text-anchor="end">{escape(name)}</text>'
            )
    end = _TOP + len(rows) * height
    caption = f"{y_label} by {x_label}; darkest: {top:.3g}"
    parts.append(f'<text class="label" x="{_LEFT}" y="{_px(end + 20)}">{escape(caption)}</text>')
    return _svg(parts, _WIDTH, math.ceil(end) + 30, caption)


@dataclass(frozen=True)
class Axis:
    """Map from values to coordinates.

    low, high: Values at the ends.
    start, end: Coordinates of `low` and `high`.
    ticks: Labelled values, from low to high.
    log: Logarithmic scale.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]
    log: bool

    def at(self, value: float) -> float:
        """Return the coordinate of a value, which must be positive on a logarithmic axis."""
        low, high, value = (
            (math.log(x) for x in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def linear_axis(
    values: Sequence[float],
    start: float,
    end: float,
    *,
    from_zero: bool = True,
    whole: bool = False,
) -> Axis:
    """Create a linear axis around all values, with about five ticks at round numbers.

    Args:
        values: If empty, the axis goes from 0 to 1.
        start: Coordinate of the axis' lowest value.
        end: Coordinate of its highest value.
        from_zero: Start at 0 if no value is negative.
        whole: Use integer ticks only.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if from_zero:
        low = min(low, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal, up to rounding
        high = low + max(1.0, abs(low))
    step = _round_step((high - low) / 5)
    if whole:
        step = math.ceil(step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], start, end, ticks, log=False)


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Create a logarithmic axis between powers of ten, with at most about seven of them as ticks.

    Args:
        values: Positive; if empty, the axis goes from 1 to 10.
        start: Coordinate of the axis' lowest value.
        end: Coordinate of its highest value.
    """
    low = math.floor(math.log10(min(values, default=1.0)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=10.0))))
    every = math.ceil((high - low) / 7)
    ticks = [10.0**i for i in range(low, high + 1, every)]
    return Axis(10.0**low, 10.0**high, start, end, ticks, log=True)


def _svg(parts: list[str], width: int, height: int, label: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> list[str]:
    parts = _x_ticks(x_axis, _TOP, _HEIGHT - _BOTTOM, x_label)
    for value in y_axis.ticks:
        y = _px(y_axis.at(value))
        parts.append(f'<path class="axis" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y}" dy="4" text-anchor="end">{value:.4g}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) // 2
    parts.append(
        f'<text class="label" text-anchor="middle" transform="translate(14 {middle}) rotate(-90)">'
        f"{escape(y_label)}</text>"
    )
    return parts


def _x_ticks(axis: Axis, top: float, bottom: float, label: str) -> list[str]:
    parts = []
    for value in axis.ticks:
        x = _px(axis.at(value))
        parts.append(f'<path class="axis" d="M{x} {_px(top)}V{_px(bottom)}"/>')
        parts.append(
            f'<text x="{x}" y="{_px(bottom + 16)}" text-anchor="middle">{value:.4g}</text>'
        )
    middle = (axis.start + axis.end) / 2
    parts.append(
        f'<text class="label" x="{_px(middle)}" y="{_px(bottom + 34)}" text-anchor="middle">'
        f"{escape(label)}</text>"
    )
    return parts


def _round_step(step: float) -> float:
    """Round up to 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(
        (m * power for m in (1.0, 2.0, 2.5, 5.0) if m * power >= step * (1 - 1e-9)), 10 * power
    )


def _shade(value: float, top: float) -> int:
    if not math.isfinite(value) or value <= 0 or top <= 0:
        return 0
    return max(1, round(_LEVELS * min(value / top, 1.0)))


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _px(value: float) -> str:
    """Format a coordinate, rounded to 0.1."""
    return f"{value:.1f}".removesuffix(".0")
