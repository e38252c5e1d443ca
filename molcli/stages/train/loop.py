"""A training run: its stages one after another, the steps of each, and the model at the end."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from molcli.config.sections import Data, Recipe, TrainConfig
from molcli.config.stages import Stage, resolve, section
from molcli.data.logits import LogitCache
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.files.receipts import read_receipt
from molcli.files.tensors import TensorReader
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import open_checkpoint, open_config
from molcli.model.compiled import compile_layers
from molcli.model.parent import open_teacher
from molcli.model.precision import matmul_dtype
from molcli.progress import Progress, silent, step
from molcli.stages.train.balance import check_top_k, set_top_k, trains_routers
from molcli.stages.train.batches import (
    check_contexts,
    check_stages,
    num_steps,
    open_logit_cache,
    open_rows,
    tokens_per_step,
)
from molcli.stages.train.checkpoint_folder import (
    Checkpoint,
    damaged,
    newest_checkpoint,
    remove_unfinished,
)
from molcli.stages.train.checkpoint_reader import load_checkpoint
from molcli.stages.train.checkpoints import (
    DATA,
    check_same_run,
    make_saver,
    refuse_nonfinite,
    run_identity,
)
from molcli.stages.train.distributed import (
    StopSignals,
    create_accelerator,
    uses_optimizer_sharding,
)
from molcli.stages.train.gradient_graph import GradientGraph, should_capture, should_compile
from molcli.stages.train.log import TrainLog
from molcli.stages.train.objective import (
    AlignmentObjective,
    LossWeights,
    Objective,
    PredictionObjective,
    Student,
    check_alignable,
    make_student,
)
from molcli.stages.train.optimizer import make_optimizer, set_trainable
from molcli.stages.train.output import run_folder, save_model
from molcli.stages.train.plan import Situation, plan
from molcli.stages.train.state import TrainState
from molcli.stages.train.steps import Run, run_stage
from molcli.stages.train.trackers import check_trackers


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
            train.max_skipped steps in a row without a finite gradient, for a stage without any
            other step, for weights that are not finite, and if the disk is full.
        Interrupted: after SIGINT or SIGTERM, when the step at hand is done and saved.
    """
    config = recipe.train if data is None else replace(recipe.train, data=data, logits=None)
    assert parent is None or config.logits is None
    check_trackers(config)
    accelerator = create_accelerator(config, out)
    ranks = accelerator.num_processes
    receipt = read_receipt(checkpoint)
    if config.stages == "auto":
        situation = Situation(parent is not None, receipt is not None, ranks)
        config = plan(config, open_config(checkpoint), situation)
    stages = resolve(config, has_parent=parent is not None)
    check_stages(config, stages, ranks, has_parent=parent is not None)
    check_contexts(config, stages, open_config(checkpoint), parent)
    recipe = replace(recipe, train=config)
    with run_folder(out, accelerator, resume=resume):
        return _train(checkpoint, out, recipe, stages, parent, accelerator, progress)


def _train(
    checkpoint: Path,
    out: Path,
    recipe: Recipe,
    stages: list[Stage],
    parent: Parent | None,
    accelerator: Accelerator,
    progress: Progress,
) -> TrainResult:
    """`train` with checked settings, in a folder that no other run writes."""
    config, device, ranks = recipe.train, accelerator.device, accelerator.num_processes
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
        _check_counters(saved, stages)
        state.restore_counters(saved.counters)
    total_tokens = sum(num_steps(s.settings) * tokens_per_step(s.settings) for s in stages)
    log = TrainLog(out, accelerator, state, config, student.loads)
    if accelerator.is_main_process:
        remove_unfinished(out / "checkpoints")
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
            load_checkpoint(state, resumed, accelerator)
        if state.stage_step == num_steps(stage.settings):
            _refuse_without_steps(state, config, stage)
            continue
        rows = open_rows(stage, cache, checkpoint, model.config.vocab_size, progress)
        identity[DATA] = rows.fingerprint()
        if resumed is not None:
            check_same_run(resumed, identity)
        targets = teacher if stage.settings.logits is None else cache
        captured = compiled and should_capture(stage.settings, model.config, device, ranks)
        objective = _make_objective(stage, student, targets, compiled=compiled, captured=captured)
        run_stage(run, stage, objective, rows, identity)
        _refuse_without_steps(state, config, stage)
        if config.checkpoint_every and number + 1 < len(stages):
            # The next stage may fail before its first checkpoint.
            saver.save(state, identity)
        accelerator.free_memory()

    saver.finish()
    log.write_page()  # a kill may have come between the last step and the page
    refuse_nonfinite(state, saver.folder, accelerator)
    set_top_k(model, model.config.num_blocks_per_tok)
    with StopSignals(), step(progress, "writing"):  # a complete model is worth the wait
        save_model(model, checkpoint, recipe, out, accelerator)
    accelerator.wait_for_everyone()
    return TrainResult(state.step, state.skipped, state.tokens, state.seconds, state.loss)


def _check_counters(saved: Checkpoint, stages: list[Stage]) -> None:
    """Raise MolError if the numbers of a checkpoint are not those of a step of these stages."""
    found = saved.counters
    done = stages[: found["stage"]]
    if found["stage"] >= len(stages) or found["stage_step"] > num_steps(
        stages[found["stage"]].settings
    ):
        raise damaged(saved.folder, f"it is at a step that stage {found['stage']} does not have")
    now, step = stages[found["stage"]].settings, found["stage_step"]
    expected = {
        "step": step + sum(num_steps(stage.settings) for stage in done),
        "row": step * now.batch_size,
        "tokens": step * tokens_per_step(now)
        + sum(num_steps(s.settings) * tokens_per_step(s.settings) for s in done),
    }
    for name, value in expected.items():
        if found[name] != value:
            raise damaged(saved.folder, f"{name} is {found[name]}, not {value}")
    if not found["skipped_in_a_row"] <= found["skipped"] <= found["step"]:
        raise damaged(saved.folder, f"it has skipped {found['skipped']} steps")


def _refuse_without_steps(state: TrainState, config: TrainConfig, stage: Stage) -> None:
    """Raise MolError at the end of a stage if every step of it was skipped: it trained nothing."""
    if state.skipped_in_a_row < state.stage_step:
        return
    name = section(config, state.stage)
    raise MolError(
        f"all {state.stage_step} steps of stage {state.stage} {stage.kind} were skipped: no "
        "gradient was finite",
        allowed="at least one step with a finite gradient in every stage",
        hint=f"another output folder and a smaller `{name}.learning_rate`, or "
        "train.precision=fp32; not_finite in log.jsonl says where the first such value was",
    )


def _make_objective(
    stage: Stage,
    student: Student,
    parent: MoLForCausalLM | LogitCache | None,
    *,
    compiled: bool,
    captured: bool,
) -> Objective:
    config = stage.settings
    balances = config.balance == "loss" and trains_routers(config, student.model.config)
    balance_weight = config.balance_weight if balances else 0.0
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
    part = "mol" if stage.kind == "align" else stage.settings.trainable
    set_trainable(model, part, routers=trains_routers(stage.settings, model.config))
    return make_optimizer(model, stage.settings)
