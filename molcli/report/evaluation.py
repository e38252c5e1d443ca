"""Tables of `molcli eval`: held-out text, agreement with the parent, recall, and lm-eval tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from molcli.report.tables import MISSING, ModelFigures, model_table, new_table

if TYPE_CHECKING:  # stages import this room, so it must not import them
    from rich.table import Table

    from molcli.stages.evaluate import Evaluation, Report
    from molcli.stages.evaluate.recall import Recall
    from molcli.stages.evaluate.tasks import Scores

_ERROR = "_stderr"  # lm-eval's suffix of a metric's standard error


def evaluation_tables(name: str, report: Report) -> list[Table]:
    """Build one table for each measurement that was made; `name` is the model's."""
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


def model_figures(evaluation: Evaluation) -> ModelFigures:
    """Return the evaluated model's figures."""
    return ModelFigures(
        evaluation.ce, evaluation.kl, evaluation.params_total, evaluation.params_active
    )


def parent_figures(evaluation: Evaluation) -> ModelFigures | None:
    """Return the parent's figures; None if there was no parent."""
    if evaluation.parent_ce is None or evaluation.parent_params is None:
        return None
    params = evaluation.parent_params
    return ModelFigures(evaluation.parent_ce, 0.0, params, params)


def _heldout(name: str, evaluation: Evaluation) -> Table:
    parent = parent_figures(evaluation)
    rows = {} if parent is None else {"parent": parent}
    title = f"{evaluation.tokens:,} held-out tokens, nats a token"
    return model_table(title, rows | {name: model_figures(evaluation)})


def _agreement(report: Report, top_one: float) -> Table:
    table = new_table("Agreement with the parent", ("share of", "agree"), text=("share of",))
    table.add_row("tokens: the same next token ranks first", f"{top_one:.1%}")
    generation = report.generation
    if generation is not None:
        length = generation.continuation_length
        table.caption = (
            f"{generation.prompts} prompts of {generation.prompt_length} tokens, greedy "
            f"continuations of {length}: the first {generation.matching_tokens:.1f} tokens agree "
            "on average."
        )
        share = generation.matching_tokens / length
        table.add_row("a continuation's tokens, before the first that differs", f"{share:.1%}")
        table.add_row("prompts: the whole continuation", f"{generation.full_match:.1%}")
    return table


def _recall(rows: list[Recall]) -> Table:
    models = ["model"] if rows[0].parent is None else ["model", "parent"]
    figures = ("leads", "of listed", "rank")
    headings = [f"{figure}\n{model}" for figure in figures for model in models]
    table = new_table(
        "Recall: the value of a key read before",
        ("filler\ntokens", *headings),
        text=(),
        caption=(
            "Share of questions whose value is the most likely of all tokens, share in which it is "
            "the most likely of the listed values, and its median rank."
        ),
    )
    for row in rows:
        scores = [row.model] if row.parent is None else [row.model, row.parent]
        cells = [f"{score.accuracy:.0%}" for score in scores]
        cells += [f"{score.accuracy_among_values:.0%}" for score in scores]
        table.add_row(f"{row.distance:,}", *cells, *(f"{s.median_rank:,}" for s in scores))
    return table


def _tasks(scores: Scores) -> Table:
    models = list(
        dict.fromkeys(n for metrics in scores.values() for m in metrics.values() for n in m)
    )
    columns = ("task", "metric", *models)
    table = new_table("lm-eval, ± standard error", columns, text=("task", "metric"))
    for task, metrics in scores.items():
        for metric, values in metrics.items():
            if _ERROR not in metric:
                errors = metrics.get(_error_of(metric), {})
                table.add_row(task, metric, *(_score(values, errors, name) for name in models))
    return table


def _error_of(metric: str) -> str:
    """Insert the suffix before a filter: "exact_match (x)" becomes "exact_match_stderr (x)"."""
    head, space, filtered_by = metric.partition(" ")
    return head + _ERROR + space + filtered_by


def _score(values: dict[str, float], errors: dict[str, float], name: str) -> str:
    if name not in values:
        return MISSING
    return f"{values[name]:.4f}" + (f" ± {errors[name]:.4f}" if name in errors else "")
