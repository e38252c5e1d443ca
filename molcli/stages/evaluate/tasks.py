"""Run tasks of the lm-eval library on model and parent."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molcli.errors import MolError
from molcli.stages.evaluate.heldout import Models

# task -> metric -> "model" or "parent" -> value. Tasks and metrics have lm-eval's names.
Scores = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval knows.

    Attributes:
        names: of tasks, groups or tags.
        manager: lm-eval's TaskManager.
    """

    names: list[str]
    manager: Any

    def run(self, models: Models, batch_size: int) -> Scores:
        """Run all tasks on both models.

        Returns:
            Every metric of every task. If a metric has a filter, its name includes the filter's.

        Raises:
            MolError: there is no tokenizer, or a task's data cannot be read.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        if models.tokenizer is None:
            raise MolError(
                "the model has no tokenizer, and lm-eval's tasks are text",
                allowed="a checkpoint of a parent with a tokenizer",
            )
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is intended here
        scores: Scores = {}
        for name, model in models.named().items():
            adapter = HFLM(
                pretrained=model,
                backend="causal",
                tokenizer=models.tokenizer,
                batch_size=batch_size,
            )
            try:
                results = simple_evaluate(
                    adapter, tasks=self.names, task_manager=self.manager, log_samples=False
                )
            except OSError as error:  # `datasets` raises it offline, too
                raise MolError(
                    f"the data of {', '.join(self.names)} cannot be read: {error}",
                    allowed="tasks whose data is local, cached, or on a Hub within reach",
                ) from error
            for task, metrics in results["results"].items():
                for key, value in metrics.items():
                    if isinstance(value, int | float) and "," in key:
                        scores.setdefault(task, {}).setdefault(_metric(key), {})[name] = value
        return scores


def open_tasks(names: list[str], include_path: Path | None) -> Tasks:
    """Find tasks by name.

    Args:
        names: of tasks, groups or tags.
        include_path: folder of further task files (.yaml), searched with its subfolders.

    Raises:
        MolError: lm-eval is not installed, or does not know a task.
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
        # The names include lm-eval's own tasks, or groups that may contain them. Reading its
        # thousands of task files takes a while, so this is done only where it is needed.
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
