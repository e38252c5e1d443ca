"""The data of a stage: checked, opened, and cut into micro-batches for each rank."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage, section
from molcli.data.logits import LogitCache, open_logits
from molcli.data.mixture import Corpus, check_data, load_rows
from molcli.data.packing import Batch, RowSource
from molcli.data.repeats import list_tokens
from molcli.data.tokenizer import open_tokenizer
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.model.configuration_mol import MoLConfig
from molcli.progress import Progress


def num_steps(config: TrainConfig) -> int:
    """Return the optimiser steps of a stage."""
    return math.ceil(config.tokens / tokens_per_step(config))


def tokens_per_step(config: TrainConfig) -> int:
    """Return the tokens of an optimiser step, on all ranks."""
    return config.batch_size * config.context_length


def micro_batch_rows(config: TrainConfig, ranks: int) -> int:
    """Return the rows in a forward pass on one rank, at most its part of the batch."""
    return min(config.micro_batch_size, config.batch_size // ranks)


@dataclass(frozen=True)
class MicroBatches:
    """The rows of one step that this rank processes, on its device.

    Attributes:
        batches: micro-batches in order, each with the (rows,) indices of its rows.
        tokens: in the rows of all ranks, without padding.
        predicted: those of them that follow another token of their document in their row.
    """

    batches: list[tuple[Tensor, Batch]]
    tokens: int
    predicted: int

    def __len__(self) -> int:
        return len(self.batches)


def micro_batches(
    rows: RowSource, index: Tensor, size: int, accelerator: Accelerator
) -> MicroBatches:
    """Load the rows of a step and take this rank's part. Does not synchronise with the device.

    Args:
        rows: of the stage.
        index: (batch_size,) int64, the rows of the step, the same on all ranks.
        size: rows of a micro-batch, at most.
        accelerator: gives rank and device.
    """
    packed = rows.select(index)  # all rows on every rank: counting them needs no communication
    places = torch.arange(len(index)).view(accelerator.num_processes, -1)
    own = places[accelerator.process_index].split(size)
    batches = [(index[part], packed.batch(part, accelerator.device)) for part in own]
    return MicroBatches(batches, packed.tokens, packed.num_targets)


def open_logit_cache(
    stages: Sequence[Stage], checkpoint: Path, vocab_size: int
) -> LogitCache | None:
    """Open the cached logits of the parent that `train.logits` names, if a stage uses them.

    Raises:
        MolError: if they do not fit tokenizer, vocabulary and context length of every such stage.
    """
    cache, tokenizer = None, open_tokenizer(checkpoint)
    for stage in stages:
        folder, length = stage.settings.logits, stage.settings.context_length
        if folder is not None:
            cache = open_logits(Path(folder), tokenizer, vocab_size=vocab_size, length=length)
    return cache


def open_rows(
    stage: Stage,
    cache: LogitCache | None,
    checkpoint: Path,
    vocab_size: int,
    progress: Progress,
) -> Corpus:
    """Open the rows of a stage.

    Args:
        stage: kind and settings.
        cache: has the rows of stages with `logits`.
        checkpoint: has the tokenizer.
        vocab_size: of the model.
        progress: shows the reading of text.

    Raises:
        MolError: for data that cannot be read.
    """
    config = stage.settings
    if config.logits is not None:
        assert cache is not None
        return cache.corpus()
    assert config.data is not None
    tokenizer, rows = open_tokenizer(checkpoint), num_steps(config) * config.batch_size
    corpus = load_rows(
        config.data,
        tokenizer,
        vocab_size=vocab_size,
        length=config.context_length,
        limit=rows * config.context_length,
        seed=config.seed,
        progress=progress,
    )
    count = math.ceil(rows * stage.repeats)  # none of them comes twice
    tokens = list_tokens(tokenizer, vocab_size)
    return corpus.with_repeats(stage.repeats, count=count, seed=config.seed, tokens=tokens)


def check_stages(
    config: TrainConfig,
    stages: list[Stage],
    ranks: int,
    *,
    has_parent: bool,
    needs_data: bool = True,
) -> None:
    """Check that every stage has what it learns from, and a batch that divides.

    Args:
        config: the train section.
        stages: of `config`.
        ranks: processes that share a batch.
        has_parent: whether a parent model is given.
        needs_data: False accepts stages without data, for an estimate.

    Raises:
        MolError: for a stage without its parent or data, a stage that cannot learn from cached
            logits, a batch that the ranks cannot share, or a number that is not finite.
    """
    for number, stage in enumerate(stages):
        settings, name = stage.settings, section(config, number)
        _check_numbers(name, settings)
        if settings.logits is not None:
            _check_cached_logits(name, stage)
        elif stage.kind != "pretrain" and not has_parent:
            raise MolError(
                f"a stage of kind {stage.kind} learns from the parent, and none is given",
                allowed="--parent PARENT, or stages of kind pretrain",
            )
        elif settings.data is not None:
            check_data(settings.data)
        elif needs_data:
            raise MolError(
                f"`{name}.data` is null: a stage of kind {stage.kind} has no data",
                allowed="--data SOURCE, train.data, or data in every stage",
            )
    check_batches(config, stages, ranks)


def check_contexts(
    config: TrainConfig, stages: list[Stage], model: MoLConfig, parent: Parent | None
) -> None:
    """Check that student and parent have positions for the rows of every stage of `config`.

    Raises:
        MolError: if they do not.
    """
    for number, stage in enumerate(stages):
        length, setting = stage.settings.context_length, f"{section(config, number)}.context_length"
        model.check_context(length, setting)
        if parent is not None:
            parent.check_context(length, setting)


def check_batches(config: TrainConfig, stages: list[Stage], ranks: int) -> None:
    """Check that `ranks` processes can share the batch of every stage of `config`.

    Raises:
        MolError: if they cannot.
    """
    for number, stage in enumerate(stages):
        settings, name = stage.settings, section(config, number)
        rows, at_most = settings.batch_size, micro_batch_rows(settings, ranks)
        if rows % ranks or rows // ranks % at_most:
            step = settings.micro_batch_size * ranks
            raise MolError(
                f"`{name}.batch_size` is {rows}, for {ranks} processes with a "
                f"`{name}.micro_batch_size` of {settings.micro_batch_size}",
                allowed="the same number of rows for each process, in micro-batches of one size",
                hint=f"--set {name}.batch_size={-(-rows // step) * step}",
            )


def _check_numbers(name: str, settings: TrainConfig) -> None:
    """A recipe that was read is checked; one that a program made may hold anything."""
    for key, value in vars(settings).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise MolError(
                f"`{name}.{key}` is {value}",
                allowed="a finite number",
                hint=f"--set {name}.{key}={getattr(TrainConfig(), key)}",
            )


def _check_cached_logits(name: str, stage: Stage) -> None:
    if stage.kind == "align":
        raise MolError(
            "a stage of kind align learns from the parent's layers, and `train.logits` has only "
            "its predictions",
            allowed="stages of kind distill and pretrain, or --data and --parent",
        )
    if stage.kind == "distill" and stage.settings.temperature != 1:
        raise MolError(
            f"`{name}.temperature` is {stage.settings.temperature}, and `train.logits` holds the "
            "largest probabilities at 1",
            allowed="1 with cached logits, or --data and --parent",
            hint=f"--set {name}.temperature=1",
        )
