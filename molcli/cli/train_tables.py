"""What a training run will do, and what it will take, as rich tables."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from molcli.config.stages import Stage

if TYPE_CHECKING:  # torch comes with it
    from molcli.stages.train.estimate import Estimate

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


def estimate_tables(estimate: "Estimate") -> list[Table]:
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
