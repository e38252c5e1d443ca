"""Tables of `molcli eval` show the measured figures."""

import io

from rich.console import Console

from molcli.report.evaluation import evaluation_tables
from molcli.stages.evaluate import Evaluation, Report
from molcli.stages.evaluate.generation import Generation
from molcli.stages.evaluate.recall import Recall, RecallScore


def printed(report: Report) -> list[list[str]]:
    """The words of every line of all tables."""
    console = Console(width=120, file=io.StringIO(), record=True)
    for table in evaluation_tables("out/model", report):
        console.print(table)
    return [line.split() for line in console.export_text().splitlines()]


def test_every_figure_is_in_its_row() -> None:
    lines = printed(
        Report(
            heldout=Evaluation(1000, 3.5, 2_000_000, 1_000_000, 0.25, 0.75, 3.25, 1_500_000),
            generation=Generation(8, 16, 10, matching_tokens=2.5, full_match=0.125),
            recall=[Recall(512, RecallScore(0.5, 0.75, 3), RecallScore(1.0, 1.0, 1))],
            tasks={
                "arc": {
                    "acc": {"model": 0.5, "parent": 0.625},
                    "acc_stderr": {"model": 0.01, "parent": 0.02},
                    "exact_match (strict)": {"model": 0.25},
                    "exact_match_stderr (strict)": {"model": 0.03},
                }
            },
        )
    )
    assert ["out/model", "3.500", "0.250", "2.0M", "1.0M"] in lines
    assert ["parent", "3.250", "0.000", "1.5M", "1.5M"] in lines
    assert [line[-1] for line in lines if line and line[-1].endswith("%")] == [
        "75.0%",
        "25.0%",
        "12.5%",
    ]
    assert ["512", "50%", "100%", "75%", "100%", "3", "1"] in lines
    assert ["arc", "acc", "0.5000", "±", "0.0100", "0.6250", "±", "0.0200"] in lines
    assert ["arc", "exact_match", "(strict)", "0.2500", "±", "0.0300", "–"] in lines
    assert not [line for line in lines if "acc_stderr" in line]


def test_without_a_parent_its_columns_are_omitted() -> None:
    lines = printed(Report(None, None, [Recall(0, RecallScore(0.0, 0.5, 40), None)]))
    assert ["0", "0%", "50%", "40"] in lines
    assert not [line for line in lines if "parent" in line]
