"""The steps of one stage: load, differentiate, update, log, save."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage
from molcli.data.mixture import Corpus
from molcli.errors import Interrupted, MolError
from molcli.model import MoLForCausalLM
from molcli.progress import Progress
from molcli.stages.train.balance import RouterLoads, scheduled_top_k, set_top_k, trains_routers
from molcli.stages.train.batches import MicroBatches, micro_batches, num_steps, tokens_per_step
from molcli.stages.train.checkpoint_folder import describe_newest
from molcli.stages.train.checkpoints import Saver
from molcli.stages.train.distributed import StopSignals
from molcli.stages.train.log import TrainLog, mfu_scale
from molcli.stages.train.nonfinite import find_nonfinite
from molcli.stages.train.objective import Objective
from molcli.stages.train.optimizer import learning_rate_ratio, set_learning_rates, update
from molcli.stages.train.state import TrainState


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
        balances = config.balance == "bias" and trains_routers(config, model.config)
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
                if balances:
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
