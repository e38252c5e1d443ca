"""The table of `molcli bench`."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table

from molcli.stages.bench import Report


def bench_tables(report: Report) -> Iterator[Table | str]:
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
