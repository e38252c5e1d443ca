"""Tasks of the lm-eval library, model and parent side by side."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molcli.errors import MolError
from molcli.stages.evaluate.heldout import Models

# task -> metric -> "model" or "parent" -> value, all as lm-eval names them.
Scores = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Tasks:
    """Known tasks. names: of tasks, groups or tags. manager: lm-eval's TaskManager."""

    names: list[str]
    manager: Any

    def run(self, models: Models, batch_size: int) -> Scores:
        """Every metric of every task; a metric's filter, where it has one, is added to its name.

        Raises MolError without a tokenizer, or where a task's data cannot be had.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        if models.tokenizer is None:
            raise MolError(
                "the model has no tokenizer, and lm-eval's tasks are text",
                allowed="a checkpoint of a parent with a tokenizer",
            )
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what we do on purpose
        scores: Scores = {}
        for name, model in models.named().items():
            wrapped = HFLM(
                pretrained=model,
                backend="causal",
                tokenizer=models.tokenizer,
                batch_size=batch_size,
            )
            try:
                found = simple_evaluate(
                    wrapped, tasks=self.names, task_manager=self.manager, log_samples=False
                )
            except OSError as error:  # also what `datasets` raises offline
                raise MolError(
                    f"the data of {', '.join(self.names)} cannot be read: {error}",
                    allowed="tasks whose data is local, cached, or on a Hub within reach",
                ) from error
            for task, metrics in found["results"].items():
                for key, value in metrics.items():
                    if isinstance(value, int | float) and "," in key:
                        scores.setdefault(task, {}).setdefault(_metric(key), {})[name] = value
        return scores


def open_tasks(names: list[str], include_path: Path | None) -> Tasks:
    """include_path: a folder of further task files (.yaml), searched with its subfolders.

    Raises MolError if lm-eval is not installed, or does not know a task.
    """
    if not names:
        raise MolError("--tasks names no task", hint="--tasks arc_easy,piqa")
    if include_path is not None and not include_path.is_dir():
        raise MolError(
            f"{include_path} is not a folder", allowed="a folder with lm-eval task files"
        )
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MolError(
            f"--tasks runs lm-eval, which is not installed ({error})",
            hint="pip install 'molcli[eval]'",
        ) from error
    manager = None
    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_subtasks):
        # Some of lm-eval's own, or groups that may hold them: its thousands of files take a while.
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise MolError(
            f"lm-eval knows no task {unknown[0]!r}",
            allowed="tasks of lm-eval, or of the files below --include-path",
            hint="lm-eval ls tasks",
        )
    return Tasks(names, manager)


def _metric(key: str) -> str:
    """lm-eval's "acc,none" -> "acc", "exact_match,strict" -> "exact_match (strict)"."""
    metric, _, filtered_by = key.partition(",")
    return metric if filtered_by == "none" else f"{metric} ({filtered_by})"
