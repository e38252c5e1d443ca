"""The table of `molcli plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # stages import this package
    from molcli.stages.plan import Plan


def plan_table(found: Plan) -> Table:
    """Return one line per candidate, the recommended one in bold."""
    gpu = found.gpu
    table = Table(
        title=f"Parent: {found.parent_total / 1e6:,.1f}M parameters, "
        f"{found.parent_flops / 1e6:,.0f}M operations a token",
        caption="Slices keep a layer's width; S+KofN are thin blocks of width×neurons, first of "
        "the shared block where it has its own. Share: "
        "active parameters without embeddings, of the parent's. Time and memory (GB) are estimates "
        f"for one {gpu.name} of {gpu.memory / 1e9:.0f} GB, training for {found.tokens:,} tokens.",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    forecast = any(c.kl is not None for c in found.candidates)
    table.add_column("shape", no_wrap=True)
    names = ["total", "active", "share", "FLOPs", "convert", "train"]
    for name in (["KL"] if forecast else []) + names:
        table.add_column(name, justify="right", no_wrap=True)
    for c in found.candidates:
        cells: list[str | Text] = [
            Text(c.name, style="bold" if c.name == found.recommended else ""),
            _count_of(c.total),
            _count_of(c.active),
            f"{c.share:.0%}",
            f"{c.flops / found.parent_flops:.0%}",
            _cost(c.conversion.seconds, c.conversion.memory, gpu.memory),
            _cost(c.training.seconds, c.training.memory, gpu.memory),
        ]
        if forecast:
            cells.insert(1, "–" if c.kl is None else f"{c.kl:.2f}")
        table.add_row(*cells)
    return table


def _cost(seconds: float, memory: float, available: float) -> Text:
    """Time and memory, in red if it is more than the GPU has."""
    colour = "red" if memory > available else ""
    return Text.assemble(_time(seconds), " ", (_bytes(memory), colour))


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f}G" if size < 1e10 else f"{size / 1e9:,.0f}G"


def _count_of(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def _time(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.{int(seconds < 10 * size)}f}{unit}"
    return f"{seconds:.0f}s"
