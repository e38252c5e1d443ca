"""Table of `molcli bench`: times of a MoL model beside those of a dense model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from molcli.report.tables import MISSING, new_table

if TYPE_CHECKING:  # stages import this room, so it must not import them
    from rich.table import Table

    from molcli.stages.bench import Report


def benchmark_tables(report: Report) -> Iterator[Table | str]:
    """Yield the table of measurements, then lines on the routing and on the machine."""
    columns = ("work", "unit", "MoL", "peer", "ratio", "")
    table = new_table(f"{report.model}; dense: {report.dense}", columns, text=("work", ""))
    for row in report.rows:
        ratio = MISSING if row.ratio is None else f"{row.ratio:.2f}×"
        peer = "" if row.peer_name == "dense" else f"peer: {row.peer_name}"
        note = "; ".join(part for part in (peer, row.note) if part)
        table.add_row(row.work, row.unit, _figure(row.mol), _figure(row.peer), ratio, note)
    yield table
    for kind, (most, least) in report.loads.items():
        yield (
            f"Routing, {kind}: the busiest block has {most:.2f} times an even share of the tokens, "
            f"the least busy one {least:.2f} times."
        )
    yield ", ".join(f"{name} {value}" for name, value in report.machine.items())


def _figure(value: float | None) -> str:
    """Format with three significant digits."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
