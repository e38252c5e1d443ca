"""Evaluate: held-out text, agreement with the parent's continuations, recall, lm-eval tasks."""

from molcli.stages.evaluate.heldout import Evaluation, Models, open_models
from molcli.stages.evaluate.run import Report, evaluate, measure
from molcli.stages.evaluate.tasks import Tasks, open_tasks

__all__ = [
    "Evaluation",
    "Models",
    "Report",
    "Tasks",
    "evaluate",
    "measure",
    "open_models",
    "open_tasks",
]
