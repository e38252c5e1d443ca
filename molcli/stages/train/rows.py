"""The rows of a stage: text that is packed, or cached with the parent's predictions."""

from collections.abc import Sequence
from pathlib import Path

from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage
from molcli.io.data import Corpus, load_rows
from molcli.io.logits import LogitCache, open_logits
from molcli.io.tokenizer import open_tokenizer
from molcli.progress import Progress
from molcli.stages.train.steps import step_tokens, steps_of


def open_cache(stages: Sequence[Stage], checkpoint: Path, vocab_size: int) -> LogitCache | None:
    """What train.logits names, if a stage uses it. Raises MolError unless it fits all that do."""
    cache, tokenizer = None, open_tokenizer(checkpoint)
    for stage in stages:
        folder, length = stage.settings.logits, stage.settings.context_length
        if folder is not None:
            cache = open_logits(Path(folder), tokenizer, vocab_size=vocab_size, length=length)
    return cache


def stage_rows(
    config: TrainConfig,
    cache: LogitCache | None,
    checkpoint: Path,
    vocab_size: int,
    progress: Progress,
) -> Corpus:
    """config: the stage's own. Raises MolError for data that cannot be read."""
    if config.logits is not None:
        assert cache is not None
        return cache.corpus()
    assert config.data is not None
    return load_rows(
        config.data,
        open_tokenizer(checkpoint),
        vocab_size=vocab_size,
        length=config.context_length,
        limit=steps_of(config) * step_tokens(config),
        seed=config.seed,
        progress=progress,
    )
