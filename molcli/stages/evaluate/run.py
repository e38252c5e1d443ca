"""Evaluate a model: held-out text alone, or all figures that data and parent allow."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from molcli.config.sections import EvaluateConfig
from molcli.data.mixture import load_documents
from molcli.data.packing import pack
from molcli.families.parent import Parent
from molcli.progress import Progress, phase, silent
from molcli.stages.evaluate.generation import (
    Generation,
    compare_generation,
    split_into_prompts,
)
from molcli.stages.evaluate.heldout import Evaluation, Models, evaluate_rows, open_models
from molcli.stages.evaluate.recall import Recall, measure_recall, recall_obstacle
from molcli.stages.evaluate.tasks import Scores


@dataclass(frozen=True)
class Report:
    """All figures of a model; None or empty where they were not measured.

    Attributes:
        heldout: figures on held-out text; they need data.
        generation: agreement of continuations; it needs data and a parent.
        recall: associative recall by distance.
        tasks: scores of lm-eval's tasks.
        skipped: figure -> why it is missing although the recipe requests it.
    """

    heldout: Evaluation | None
    generation: Generation | None
    recall: list[Recall]
    tasks: Scores = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON: held-out figures at the top level, others by name."""
        figures = asdict(self)
        return (figures.pop("heldout") or {}) | figures


def evaluate(
    checkpoint: Path,
    parent: Parent | None,
    data: str,
    config: EvaluateConfig,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate a checkpoint on held-out text only.

    Both models get the same packed rows, in the checkpoint's precision on a GPU, in fp32 on a CPU;
    logits are fp32.

    Args:
        checkpoint: folder of the model.
        parent: the dense model to compare with, if any.
        data: source of the text, of which the first config.tokens tokens are used, in order.
        config: tokens, context length and batch size.
        progress: called with processed and total tokens.

    Raises:
        MolError: the checkpoint, the parent or the data cannot be used.
    """
    models = open_models(checkpoint, parent)
    models.check_context(config.context_length, "evaluate.context_length")
    rows = pack(_documents(models, data, config), config.context_length, seed=None, pad_last=True)
    return evaluate_rows(models, rows, config.batch_size, progress)


def measure(
    models: Models, data: str | None, config: EvaluateConfig, progress: Progress = silent
) -> Report:
    """Measure all figures but tasks, as far as the recipe, the data and the parent allow.

    Args:
        models: the model, and its parent if there is one.
        data: source of held-out text, of which the first config.tokens tokens are used.
        config: the recipe's section `evaluate`.
        progress: counts tokens of held-out text; its phases count prompts.

    Raises:
        MolError: the data cannot be used.
    """
    heldout = generation = None
    scores: list[Recall] = []
    skipped: dict[str, str] = {}
    if data is not None:
        models.check_context(config.context_length, "evaluate.context_length")
        if models.parent is not None and config.num_prompts:
            length = config.prompt_length + config.continuation_length
            models.check_context(
                length,
                "evaluate.prompt_length",
                found=f"`evaluate.prompt_length` and `continuation_length` are {length} together",
            )
        documents = _documents(models, data, config)
        rows = pack(documents, config.context_length, seed=None, pad_last=True)
        prompts = split_into_prompts(documents, config.num_prompts, config.prompt_length)
        heldout = evaluate_rows(models, rows, config.batch_size, progress)
        if models.parent is not None and len(prompts):
            # A decoding step takes as long for few prompts as for many, so a batch of prompts has
            # as many tokens as a batch of rows.
            length = config.continuation_length
            tokens = config.prompt_length + length
            batch_size = max(1, config.batch_size * config.context_length // tokens)
            generation = compare_generation(
                models, prompts, length, batch_size, phase(progress, "continuing")
            )
        elif models.parent is not None and config.num_prompts:
            skipped["generation"] = f"no document has {config.prompt_length} tokens"
    if config.recall_sequences:
        obstacle = recall_obstacle(models.tokenizer, config.recall_pairs)
        scores = [] if obstacle else measure_recall(models, config, phase(progress, "recall"))
        if not scores:
            skipped["recall"] = obstacle or "no distance fits the model's positions"
    return Report(heldout, generation, scores, skipped=skipped)


def _documents(models: Models, data: str, config: EvaluateConfig) -> list[Tensor]:
    return list(
        load_documents(
            data,
            models.tokenizer,
            vocab_size=models.model.config.vocab_size,
            limit=config.tokens,
        )
    )
