"""What a model is worth: held-out text, its parent's continuations, recall, lm-eval's tasks."""

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
