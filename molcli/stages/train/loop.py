"""A training run: its stages one after another, the steps of each, and the model at the end."""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from molcli.config.sections import Data, Recipe, TrainConfig
from molcli.config.stages import Stage, resolve
from molcli.data.logits import LogitCache
from molcli.data.mixture import Corpus
from molcli.errors import Interrupted, MolError
from molcli.families.parent import Parent
from molcli.files.tensors import TensorReader
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import open_checkpoint, open_config
from molcli.model.compiled import compile_layers
from molcli.model.parent import open_teacher
from molcli.model.precision import matmul_dtype
from molcli.progress import Progress, silent
from molcli.stages.train.balance import RouterLoads, check_top_k, scheduled_top_k, set_top_k
from molcli.stages.train.batches import (
    MicroBatches,
    check_contexts,
    check_stages,
    micro_batches,
    num_steps,
    open_logit_cache,
    open_rows,
    tokens_per_step,
)
from molcli.stages.train.checkpoints import (
    DATA,
    Saver,
    check_same_run,
    describe_newest,
    load_checkpoint,
    make_saver,
    newest_checkpoint,
    run_identity,
)
from molcli.stages.train.distributed import (
    StopSignals,
    create_accelerator,
    uses_optimizer_sharding,
)
from molcli.stages.train.gradient_graph import GradientGraph, should_capture, should_compile
from molcli.stages.train.log import TrainLog, check_trackers, mfu_scale
from molcli.stages.train.nonfinite import find_nonfinite
from molcli.stages.train.objective import (
    AlignmentObjective,
    LossWeights,
    Objective,
    PredictionObjective,
    Student,
    check_alignable,
    make_student,
)
from molcli.stages.train.optimizer import (
    learning_rate_ratio,
    make_optimizer,
    set_learning_rates,
    set_trainable,
    update,
)
from molcli.stages.train.output import RECEIPT, check_output, save_model
from molcli.stages.train.plan import Situation, plan
from molcli.stages.train.state import TrainState


@dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Attributes:
        steps: of the optimiser, skipped ones included.
        skipped: steps skipped because their gradient was not finite.
        tokens: of the whole run, resumptions included.
        seconds: of the whole run, resumptions included.
        loss: what was minimised, mean over the last logged window; nan if all its steps were
            skipped.
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
    """Train the model in `checkpoint` as recipe.train says, and write it to `out`.

    During the run, `out` holds log.jsonl and checkpoints/; config.json is written last. Under
    torchrun every rank calls this and processes its part of each batch.

    Args:
        checkpoint: folder of a Mixture of Layers model.
        out: folder of the run.
        data: replaces train.data and train.logits if given.
        recipe: the section `train` counts.
        parent: dense model to learn from; None without one, or with its cached logits.
        resume: continue from the newest checkpoint in `out`, bit for bit; another number of ranks
            may continue.
        progress: called after each step with tokens done, tokens in all, and a note.

    Returns:
        Counts and the last loss.

    Raises:
        MolError: for a checkpoint, parent, data or output folder that cannot be used, after
            train.max_skipped steps in a row without a finite gradient, and if the disk is full.
        Interrupted: after SIGINT or SIGTERM, when the step at hand is done and saved.
    """
    config = recipe.train if data is None else replace(recipe.train, data=data, logits=None)
    assert parent is None or config.logits is None
    check_trackers(config)
    accelerator = create_accelerator(config, out)
    device, ranks = accelerator.device, accelerator.num_processes
    if config.stages == "auto":
        situation = Situation(parent is not None, (checkpoint / RECEIPT).is_file(), ranks)
        config = plan(config, open_config(checkpoint), situation)
    stages = resolve(config, has_parent=parent is not None)
    check_stages(config, stages, ranks, has_parent=parent is not None)
    check_contexts(config, stages, open_config(checkpoint), parent)
    # No rank creates the folder before all have passed this check: sharding synchronises them.
    check_output(out, resume=resume)
    torch.manual_seed(config.seed)

    # Where ranks shard the weights, none of their GPUs ever holds all of them.
    model = open_checkpoint(checkpoint, device if ranks == 1 else torch.device("cpu")).train()
    model.to(torch.float32)  # master weights: bf16 would round small updates away
    check_top_k(config, model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    dtype = matmul_dtype(config, device)
    optimizer_sharding = uses_optimizer_sharding(config, model.config, device, ranks)
    student = make_student(model, dtype, accelerator, optimizer_sharding=optimizer_sharding)
    teacher = None if parent is None else open_teacher(parent, model, dtype)
    if teacher is not None and any(stage.kind == "align" for stage in stages):
        check_alignable(model, teacher)
    cache = open_logit_cache(stages, checkpoint, model.config.vocab_size)
    source = parent if cache is None else cache
    identity = run_identity(
        config,
        stages,
        checkpoint=TensorReader(checkpoint).fingerprint(),
        parent="" if source is None else source.fingerprint(),
    )
    state = TrainState(model, _fresh_optimizer(model, stages[0]))
    saved = newest_checkpoint(out / "checkpoints")
    if saved is not None:
        check_same_run(saved, identity)
        state.restore_counters(saved.counters)
    total_tokens = sum(num_steps(s.settings) * tokens_per_step(s.settings) for s in stages)
    log = TrainLog(out, accelerator, state, config, student.loads)
    saver = make_saver(accelerator, out / "checkpoints")
    run = Run(accelerator, state, saver, log, student.loads, total_tokens, progress)
    compiled = should_compile(config, total_tokens, device)
    for network in (model, teacher) if compiled else ():
        if network is not None:
            compile_layers(network)  # once for all stages

    for number in range(state.stage, len(stages)):
        stage = stages[number]
        if number > state.stage:
            state.next_stage()
        state.optimizer = _fresh_optimizer(model, stage)
        resumed = saved if saved is not None and state.stage == saved.counters["stage"] else None
        if resumed is not None:
            load_checkpoint(state, resumed)
        if state.stage_step == num_steps(stage.settings):
            continue
        rows = open_rows(stage.settings, cache, checkpoint, model.config.vocab_size, progress)
        identity[DATA] = rows.fingerprint()
        if resumed is not None:
            check_same_run(resumed, identity)
        targets = teacher if stage.settings.logits is None else cache
        captured = compiled and should_capture(stage.settings, model.config, device, ranks)
        objective = _make_objective(stage, student, targets, compiled=compiled, captured=captured)
        if accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
        run_stage(run, stage, objective, rows, identity)
        if config.checkpoint_every and number + 1 < len(stages):
            # The next stage may fail before its first checkpoint.
            saver.save(state, identity)
        accelerator.free_memory()

    saver.finish()
    set_top_k(model, model.config.num_blocks_per_tok)
    save_model(model, checkpoint, replace(recipe, train=config), out, accelerator)
    accelerator.wait_for_everyone()
    return TrainResult(state.step, state.skipped, state.tokens, state.seconds, state.loss)


@dataclass(frozen=True)
class Run:
    """What all stages of a run share.

    Attributes:
        accelerator: ranks and device.
        state: everything that changes.
        saver: writes checkpoints.
        log: writes log.jsonl.
        loads: counts the routing.
        total_tokens: of all stages.
        progress: called after each step.
    """

    accelerator: Accelerator
    state: TrainState
    saver: Saver
    log: TrainLog
    loads: RouterLoads
    total_tokens: int
    progress: Progress


def run_stage(
    run: Run, stage: Stage, objective: Objective, rows: Corpus, identity: dict[str, Any]
) -> None:
    """Train from state.stage_step to the end of the stage.

    Args:
        run: what all stages share.
        stage: kind and settings.
        objective: what is minimised.
        rows: of the stage.
        identity: of the run, for its checkpoints.

    Raises:
        Interrupted: after a signal.
        MolError: after too many steps in a row without a finite gradient.
    """
    state, config, accelerator = run.state, stage.settings, run.accelerator
    model, name, steps = state.model, f"{state.stage} {stage.kind}", num_steps(config)
    order = rows.order(config.seed + state.stage)
    start = time.perf_counter() - state.seconds

    def load(row: int) -> MicroBatches:
        index = order.indices(row, config.batch_size)
        return micro_batches(rows, index, config.micro_batch_size, accelerator)

    parent = objective.parent if isinstance(objective.parent, MoLForCausalLM) else None
    scale = mfu_scale(stage, model, parent, accelerator.num_processes)
    with StopSignals() as stop, run.log.open_stage(state, scale):
        next_batches = load(state.row)
        while state.stage_step < steps:
            ratio = learning_rate_ratio(state.stage_step, steps, config)
            set_learning_rates(state.optimizer, ratio)
            _anneal_top_k(run, config)
            batches = next_batches
            means = objective.backward(batches, accelerator)
            norm, is_finite = update(model, state.optimizer, config.clip_norm, accelerator)
            # `is_finite` is the only synchronisation with a GPU in a step, and waits for the norm.
            # Work that can run before it does, and while the GPU updates the weights, the host goes
            # on to the next step.
            next_batches = load(state.row + config.batch_size)
            finite = is_finite()
            if finite:
                run.log.add_step(means)
                run.loads.add_step_to_window()
                if config.balance == "bias":
                    run.loads.update_biases(config.bias_update_rate, accelerator)
                state.skipped_in_a_row = 0
            else:
                check = partial(objective.losses_are_finite, batches, accelerator)
                cause = find_nonfinite(model, check, accelerator)
                run.log.skip_step(cause)
                state.skipped += 1
                state.skipped_in_a_row += 1
            run.loads.reset_step()
            state.optimizer.zero_grad()
            state.step += 1
            state.stage_step += 1
            state.row += config.batch_size
            state.tokens += tokens_per_step(config)
            state.seconds = time.perf_counter() - start

            last = state.stage_step == steps
            if state.step % config.log_every == 0 or last or not finite:
                rate = ratio * config.learning_rate
                passes = rows.epochs(state.row)
                run.log.write(state, name, norm, rate, objective.metrics, passes)
            if accelerator.is_main_process:
                run.progress(state.tokens, run.total_tokens, run.log.note)
            if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                run.saver.save(state, identity)
            if state.skipped_in_a_row >= config.max_skipped:
                run.saver.finish()
                raise _too_many_skipped(state, run.saver.folder, cause)
            if number := stop.agree(accelerator):
                run.saver.save(state, identity)
                run.saver.finish()
                accelerator.wait_for_everyone()  # torchrun kills the rest when one process ends
                place = f"step {state.stage_step} of {steps} of stage {name}"
                raise Interrupted(number, f"{place} is saved in {run.saver.folder}")


def _make_objective(
    stage: Stage,
    student: Student,
    parent: MoLForCausalLM | LogitCache | None,
    *,
    compiled: bool,
    captured: bool,
) -> Objective:
    config = stage.settings
    balance_weight = config.balance_weight if config.balance == "loss" else 0.0
    if stage.kind == "align":
        assert isinstance(parent, MoLForCausalLM)
        return AlignmentObjective(
            student.model, parent, student.dtype, balance_weight, student.loads
        )
    weights = LossWeights(
        ce=1.0 if stage.kind == "pretrain" else config.ce_weight,
        kl=config.kl_weight,
        temperature=config.temperature,
        compiled=compiled,
    )
    targets = parent if stage.kind == "distill" else None
    graph = GradientGraph(student.model) if captured else None
    return PredictionObjective(student, targets, weights, balance_weight, graph)


def _fresh_optimizer(model: MoLForCausalLM, stage: Stage) -> torch.optim.Optimizer:
    """Moments of another loss, and of other learning rates, would mislead the next stage."""
    set_trainable(model, "mol" if stage.kind == "align" else stage.settings.trainable)
    return make_optimizer(model, stage.settings)


def _anneal_top_k(run: Run, config: TrainConfig) -> None:
    if config.start_top_k is not None:
        total, model = int(config.top_k_fraction * run.total_tokens), run.state.model
        end = model.config.num_blocks_per_tok
        set_top_k(model, scheduled_top_k(run.state.tokens, total, config.start_top_k, end))


def _too_many_skipped(state: TrainState, checkpoints: Path, cause: str) -> MolError:
    return MolError(
        f"the gradients of {state.skipped_in_a_row} steps in a row were not finite, up to step "
        f"{state.step}; the first value that is not finite is in {cause}",
        allowed="fewer than train.max_skipped such steps in a row",
        hint="another output folder with smaller learning rates, or train.precision=fp32; the last "
        f"good checkpoint is {describe_newest(checkpoints)}",
    )
