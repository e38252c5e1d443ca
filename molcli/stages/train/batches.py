"""The rows of a stage, and the share of each process in a step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage
from molcli.data.logits import LogitCache, open_logits
from molcli.data.mixture import Corpus, load_rows
from molcli.data.packing import Batch, RowSource
from molcli.data.tokenizer import open_tokenizer
from molcli.progress import Progress


def steps_of(config: TrainConfig) -> int:
    """Optimiser steps of a stage."""
    return math.ceil(config.tokens / step_tokens(config))


def step_tokens(config: TrainConfig) -> int:
    """Tokens in an optimiser step."""
    return config.batch_size * config.context_length


def rows_at_once(config: TrainConfig, ranks: int) -> int:
    """Rows in a forward pass of one of `ranks` processes: no more than its share of the batch."""
    return min(config.micro_batch_size, config.batch_size // ranks)


@dataclass(frozen=True)
class MicroBatches:
    """This rank's share of a step's rows, on its device.

    batches: one after another, each with the indices of its rows. tokens, predicted: in the rows of
    all ranks, without padding; predicted are those that another one of their document and row
    precedes.
    """

    batches: list[tuple[Tensor, Batch]]
    tokens: int
    predicted: int

    def __len__(self) -> int:
        return len(self.batches)


def micro_batches(
    rows: RowSource, index: Tensor, size: int, accelerator: Accelerator
) -> MicroBatches:
    """The rows `index`, (batch_size,), of which a rank takes at most `size` at once.

    A GPU may still be at other work, for which nothing here waits.
    """
    packed = rows.select(index)  # by every rank, so that none has to ask the others for its counts
    places = torch.arange(len(index)).view(accelerator.num_processes, -1)
    mine = places[accelerator.process_index].split(size)
    batches = [(index[part], packed.batch(part, accelerator.device)) for part in mine]
    return MicroBatches(batches, packed.tokens, packed.num_targets)


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
