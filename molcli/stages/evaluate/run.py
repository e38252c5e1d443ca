"""All figures of one model, from one opening of it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from molcli.config.sections import EvaluateConfig
from molcli.data.mixture import load_documents
from molcli.data.packing import pack
from molcli.families.parent import Parent
from molcli.progress import Progress, silent
from molcli.stages.evaluate.generation import Generation, compare, cut_prompts
from molcli.stages.evaluate.heldout import Evaluation, Models, open_models, predict
from molcli.stages.evaluate.recall import Recall, missing_for_recall, recall
from molcli.stages.evaluate.tasks import Scores


@dataclass(frozen=True)
class Report:
    """What was measured; None or empty where it was not. heldout and generation need data,
    generation a parent too. skipped: figure -> why it is missing although the recipe asks for it.
    """

    heldout: Evaluation | None
    generation: Generation | None
    recall: list[Recall]
    tasks: Scores = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The held-out figures on top, the others under their names."""
        figures = asdict(self)
        return (figures.pop("heldout") or {}) | figures


def evaluate(
    checkpoint: Path,
    parent: Parent | None,
    data: str,
    config: EvaluateConfig,
    progress: Progress = silent,
) -> Evaluation:
    """Held-out figures alone, on the first config.tokens of `data`, in the file's order.

    Both models see the same packed rows, in the same precision: that of the checkpoint on a GPU,
    fp32 on a CPU; logits are fp32. Raises MolError for a checkpoint, parent or data that cannot
    be used.
    """
    models = open_models(checkpoint, parent)
    rows = pack(_documents(models, data, config), config.context_length, seed=None, pad_last=True)
    return predict(models, rows, config.batch_size, progress)


def measure(
    models: Models, data: str | None, config: EvaluateConfig, progress: Progress = silent
) -> Report:
    """All but the tasks: whatever the recipe, the data and the parent at hand allow.

    data: held-out text, of which the first config.tokens count. Raises MolError as `evaluate` does.
    """
    heldout = generation = None
    scores: list[Recall] = []
    skipped: dict[str, str] = {}
    if data is not None:
        documents = _documents(models, data, config)
        rows = pack(documents, config.context_length, seed=None, pad_last=True)
        prompts = cut_prompts(documents, config.num_prompts, config.prompt_length)
        heldout = predict(models, rows, config.batch_size, progress)
        if models.parent is not None and len(prompts):
            # A step of decoding takes as long for a few prompts as for many: as many at a time as
            # have the tokens of a batch of rows.
            tokens = config.prompt_length + config.continuation_length
            at_once = max(1, config.batch_size * config.context_length // tokens)
            generation = compare(models, prompts, config.continuation_length, at_once, progress)
        elif models.parent is not None and config.num_prompts:
            skipped["generation"] = f"no document has {config.prompt_length} tokens"
    if config.recall_sequences:
        missing = missing_for_recall(models.tokenizer, config.recall_pairs)
        scores = [] if missing else recall(models, config, progress)
        if not scores:
            skipped["recall"] = missing or "no distance fits the model's positions"
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
