"""Tables for the terminal: what the other modules build theirs from."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

MISSING = "–"


@dataclass(frozen=True)
class ModelFigures:
    """A model's figures on held-out text.

    ce: Cross-entropy, nats per token.
    kl: KL divergence to the parent, nats per token; None if unknown.
    params_total: Number of parameters.
    params_active: Number of parameters that run on each token.
    """

    ce: float
    kl: float | None
    params_total: int
    params_active: int


def model_table(title: str, rows: Mapping[str, ModelFigures]) -> Table:
    """Build a table with one line per model; the keys of `rows` are the models' names."""
    columns = ("model", "cross-entropy", "KL to parent", "parameters", "active")
    table = new_table(title, columns, text=("model",))
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row.ce:.3f}",
            MISSING if row.kl is None else f"{row.kl:.3f}",
            millions(row.params_total),
            millions(row.params_active),
        )
    return table


def new_table(
    title: str,
    columns: Sequence[str],
    *,
    text: Collection[str],
    caption: str | None = None,
    compact: bool = False,
    no_wrap: bool = False,
) -> Table:
    """Create an empty table.

    Args:
        title: Printed above.
        columns: Names of the columns, right-aligned for numbers.
        text: Columns that are left-aligned.
        caption: Printed below.
        compact: Use less padding.
        no_wrap: Keep each cell on one line.
    """
    table = Table(
        title=title,
        caption=caption,
        box=SIMPLE_HEAD,
        pad_edge=not compact,
        collapse_padding=compact,
    )
    for name in columns:
        table.add_column(name, justify="left" if name in text else "right", no_wrap=no_wrap)
    return table


def millions(count: int) -> str:
    """Format a count in millions, such as 134.5M."""
    return f"{count / 1e6:,.1f}M"
