"""What `molcli eval` found, as rich tables."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from molcli.cli.tables import figures_of, figures_table, parent_figures
from molcli.stages.evaluate import Evaluation, Report
from molcli.stages.evaluate.recall import Recall
from molcli.stages.evaluate.tasks import Scores

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
