"""The training loop."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from molcli.config.sections import Data, Recipe, TrainConfig
from molcli.errors import MolError
from molcli.io.data import load_rows
from molcli.io.logits import open_logits
from molcli.io.parent import Parent
from molcli.io.tensors import TensorReader
from molcli.io.tokenizer import open_tokenizer
from molcli.model.checkpoint import default_device, open_checkpoint
from molcli.model.precision import matmul_dtype
from molcli.model.teacher import open_teacher
from molcli.progress import Progress, silent
from molcli.stages.train.log import TrainLog
from molcli.stages.train.objective import Objective, Student
from molcli.stages.train.optimizer import (
    freeze_inherited,
    learning_rate_ratio,
    make_optimizer,
    set_learning_rates,
)
from molcli.stages.train.output import refuse_folder, save_model
from molcli.stages.train.state import TrainState, load_checkpoint, run_identity, save_checkpoint


@dataclass(frozen=True)
class TrainResult:
    """steps: of the optimiser, `skipped` of them left out for a gradient that was not finite.
    tokens, seconds: of the whole run, resumptions included. loss: what was minimised, mean over
    the last logged window; nan if every step of it was skipped.
    """

    steps: int
    skipped: int
    tokens: int
    seconds: float
    loss: float

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run."""
        return self.tokens / self.seconds if self.seconds else 0.0


def train(
    checkpoint: Path,
    out: Path,
    data: Data | None,
    recipe: Recipe,
    parent: Parent | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> TrainResult:
    """Trains the model in `checkpoint` on `data` as recipe.train says, and leaves it in `out`.

    With a parent, the loss is kl_weight times the KL to it plus ce_weight times the next-token
    loss; without, the next-token loss alone. recipe.train.logits stands for both data and parent,
    which are None then. The balance loss is added to either. While it runs,
    `out` holds log.jsonl and checkpoints/, from which resume=True goes on bit for bit; config.json
    appears there last. Under torchrun each rank takes its share of every batch.

    Raises MolError for a checkpoint, parent, data or output folder that cannot be used.
    """
    config = recipe.train
    accelerator = Accelerator(cpu=default_device().type == "cpu")
    is_main = accelerator.is_main_process
    _check_batch(config, accelerator.num_processes)
    if is_main:
        refuse_folder(out, resume=resume)
    torch.manual_seed(config.seed)

    model = open_checkpoint(checkpoint, accelerator.device).train()
    model.to(torch.float32)  # master weights: bf16 would swallow small updates
    if config.trainable == "mol":
        freeze_inherited(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    dtype = matmul_dtype(config, accelerator.device)
    tokenizer, cache = open_tokenizer(checkpoint), None
    if config.logits is not None:
        vocabulary, length = model.config.vocab_size, config.context_length
        cache = open_logits(Path(config.logits), tokenizer, vocab_size=vocabulary, length=length)
    teacher = cache if parent is None else open_teacher(parent, model, dtype)
    step_tokens = config.batch_size * config.context_length
    steps = math.ceil(config.tokens / step_tokens)
    if cache is not None:
        rows = cache.corpus()
    else:
        assert data is not None, "train.data or train.logits"
        rows = load_rows(
            data,
            tokenizer,
            vocab_size=model.config.vocab_size,
            length=config.context_length,
            limit=steps * step_tokens,
            seed=config.seed,
            progress=progress,
        )
    taught = cache if cache is not None else parent

    state = TrainState(model, make_optimizer(model, config))
    identity = run_identity(
        config,
        data=rows.fingerprint(),
        checkpoint=TensorReader(checkpoint).fingerprint(),
        parent="" if taught is None else taught.fingerprint(),
    )
    load_checkpoint(state, out / "checkpoints", identity)
    ce_weight = 1.0 if teacher is None else config.ce_weight
    student = Student(model, dtype, ce_weight=ce_weight, kl_weight=config.kl_weight)
    objective = Objective(accelerator.prepare(student), teacher, config.balance_weight)
    order = rows.order(config.seed)
    if is_main:
        out.mkdir(parents=True, exist_ok=True)
    log = TrainLog(out, accelerator, state)
    clock = time.perf_counter() - state.seconds

    while state.step < steps:
        ratio = learning_rate_ratio(state.step, steps, config)
        set_learning_rates(state.optimizer, ratio)
        index = order.take(state.row, config.batch_size)
        means = objective.backward(rows, index, config.micro_batch_size, accelerator)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        if torch.isfinite(norm):  # ranks agree: they have averaged their gradients
            state.optimizer.step()
            log.add(means)
        else:
            state.skipped += 1
        state.optimizer.zero_grad()
        state.step += 1
        state.row += config.batch_size
        state.tokens += step_tokens
        state.seconds = time.perf_counter() - clock

        if state.step % config.log_every == 0 or state.step == steps:
            passes = rows.passes(state.row)
            log.write(state, norm, ratio * config.learning_rate, passes, kl=teacher is not None)
        if is_main:
            progress(state.tokens, steps * step_tokens, log.note)
            if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                save_checkpoint(state, out / "checkpoints", identity)

    if is_main:
        save_model(model, checkpoint, replace(recipe, train=replace(config, data=data)), out)
    accelerator.wait_for_everyone()
    return TrainResult(state.step, state.skipped, state.tokens, state.seconds, state.loss)


def _check_batch(config: TrainConfig, ranks: int) -> None:
    share = config.micro_batch_size * ranks
    if config.batch_size % share:
        raise MolError(
            f"`train.batch_size` is {config.batch_size}, for {ranks} processes with a "
            f"`train.micro_batch_size` of {config.micro_batch_size}",
            allowed=f"multiples of {share}",
            hint=f"--set train.batch_size={-(-config.batch_size // share) * share}",
        )
