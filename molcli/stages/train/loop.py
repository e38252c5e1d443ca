"""A training run: its stages one after another, and the model at their end."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from molcli.config.sections import Data, Recipe
from molcli.config.stages import Stage, resolve
from molcli.data.logits import LogitCache
from molcli.families.parent import Parent
from molcli.files.tensors import TensorReader
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import open_checkpoint, open_config
from molcli.model.compiled import compile_layers
from molcli.model.parent import open_teacher
from molcli.model.precision import matmul_dtype
from molcli.progress import Progress, silent
from molcli.stages.train.align import Alignment, check_alignable
from molcli.stages.train.balance import set_top_k
from molcli.stages.train.batches import open_cache, stage_rows, step_tokens, steps_of
from molcli.stages.train.distributed import make_student, open_ranks
from molcli.stages.train.gradient_graph import GradientGraph, worth_compiling, worth_recording
from molcli.stages.train.log import TrainLog
from molcli.stages.train.objective import Objective, Student, Weights
from molcli.stages.train.optimizer import make_optimizer, set_trainable
from molcli.stages.train.output import RECEIPT, refuse_folder, save_model
from molcli.stages.train.plan import Situation, check_stages, check_top_k, plan
from molcli.stages.train.saver import DATA, open_saver, refuse_another_run, run_identity
from molcli.stages.train.sharding import keeps_whole
from molcli.stages.train.state import (
    TrainState,
    load_checkpoint,
    newest_checkpoint,
    restore_counters,
)
from molcli.stages.train.steps import Run, run_stage
from molcli.stages.train.trackers import check_trackers


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
    """Trains the model in `checkpoint` as recipe.train says, and leaves it in `out`.

    data: takes the place of train.data and train.logits where given. parent: None where those
    logits stand for it. While it runs, `out` holds log.jsonl and
    checkpoints/, from which resume=True goes on bit for bit; config.json appears there last. Under
    torchrun each rank takes its share of model and batch; another number of ranks may resume.
    SIGINT and SIGTERM end it after the step at hand, with a checkpoint and Interrupted.
    Raises MolError for a checkpoint, parent, data or output folder that cannot be used, after
    train.max_skipped steps in a row without a finite gradient, and where the disk takes no more.
    """
    config = recipe.train if data is None else replace(recipe.train, data=data, logits=None)
    assert parent is None or config.logits is None
    check_trackers(config)
    accelerator = open_ranks(config, out)
    if config.stages == "auto":
        situation = Situation(
            parent is not None, (checkpoint / RECEIPT).is_file(), accelerator.num_processes
        )
        config = plan(config, open_config(checkpoint), situation)
    stages = resolve(config, has_parent=parent is not None)
    check_stages(config, stages, accelerator.num_processes, has_parent=parent is not None)
    refuse_folder(out, resume=resume)  # no rank makes it before all have come to share the model
    torch.manual_seed(config.seed)

    # Where processes share the weights, none of their GPUs ever holds all of them.
    device = accelerator.device if accelerator.num_processes == 1 else torch.device("cpu")
    model = open_checkpoint(checkpoint, device).train()
    model.to(torch.float32)  # master weights: bf16 would swallow small updates
    check_top_k(config, model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    dtype = matmul_dtype(config, accelerator.device)
    whole = keeps_whole(config, model.config, accelerator.device, accelerator.num_processes)
    student = make_student(model, dtype, accelerator, whole=whole)
    teacher = None if parent is None else open_teacher(parent, model, dtype)
    if teacher is not None and any(stage.kind == "align" for stage in stages):
        check_alignable(model, teacher)
    cache = open_cache(stages, checkpoint, model.config.vocab_size)
    taught = parent if cache is None else cache
    identity = run_identity(
        config,
        stages,
        checkpoint=TensorReader(checkpoint).fingerprint(),
        parent="" if taught is None else taught.fingerprint(),
    )
    state = TrainState(model, _optimizer(model, stages[0]))
    saved = newest_checkpoint(out / "checkpoints")
    if saved is not None:
        refuse_another_run(saved, identity)
        restore_counters(state, saved)
    log = TrainLog(out, accelerator, state, config, student.loads)
    total = sum(steps_of(stage.settings) * step_tokens(stage.settings) for stage in stages)
    saver = open_saver(accelerator, out / "checkpoints")
    run = Run(accelerator, state, saver, log, student.loads, total, progress)
    compiled = worth_compiling(config, total, accelerator.device)
    for taking_part in (model, teacher) if compiled else ():
        if taking_part is not None:
            compile_layers(taking_part)  # once for all stages

    for number in range(state.stage, len(stages)):
        stage = stages[number]
        if number > state.stage:
            state.next_stage()
        state.optimizer = _optimizer(model, stage)
        here = saved if saved is not None and state.stage == saved.counters["stage"] else None
        if here is not None:
            load_checkpoint(state, here)
        if state.stage_step == steps_of(stage.settings):
            continue
        rows = stage_rows(stage.settings, cache, checkpoint, model.config.vocab_size, progress)
        identity[DATA] = rows.fingerprint()
        if here is not None:
            refuse_another_run(here, identity)
        learned = teacher if stage.settings.logits is None else cache
        graphs = compiled and worth_recording(
            stage.settings, model.config, accelerator.device, accelerator.num_processes
        )
        objective = _objective(stage, student, learned, compiled=compiled, graphs=graphs)
        if accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
        run_stage(run, stage, objective, rows, identity)
        if config.checkpoint_every and number + 1 < len(stages):
            # What the next stage fails on may come late.
            saver.save(state, identity)
        accelerator.free_memory()

    saver.finish()
    set_top_k(model, model.config.num_blocks_per_tok)
    save_model(model, checkpoint, replace(recipe, train=config), out, accelerator)
    accelerator.wait_for_everyone()
    return TrainResult(state.step, state.skipped, state.tokens, state.seconds, state.loss)


def _objective(
    stage: Stage,
    student: Student,
    parent: MoLForCausalLM | LogitCache | None,
    *,
    compiled: bool,
    graphs: bool,
) -> Objective | Alignment:
    config = stage.settings
    balance_weight = config.balance_weight if config.balance == "loss" else 0.0
    if stage.kind == "align":
        assert isinstance(parent, MoLForCausalLM)
        return Alignment(student.model, parent, student.dtype, balance_weight, student.loads)
    weights = Weights(
        ce=1.0 if stage.kind == "pretrain" else config.ce_weight,
        kl=config.kl_weight,
        temperature=config.temperature,
        compiled=compiled,
    )
    taught = parent if stage.kind == "distill" else None
    graph = GradientGraph(student.model) if graphs else None
    return Objective(student, taught, weights, balance_weight, graph)


def _optimizer(model: MoLForCausalLM, stage: Stage) -> torch.optim.Optimizer:
    """A fresh one: moments of another loss, and of other learning rates, would mislead it."""
    set_trainable(model, "mol" if stage.kind == "align" else stage.settings.trainable)
    return make_optimizer(model, stage.settings)
