"""The steps of one stage; a signal to stop lets the step at hand finish."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage
from molcli.data.mixture import Corpus
from molcli.errors import Interrupted, MolError
from molcli.model import MoLForCausalLM
from molcli.progress import Progress
from molcli.stages.train.align import Alignment
from molcli.stages.train.balance import RouterLoads, set_top_k, top_k_at
from molcli.stages.train.batches import MicroBatches, micro_batches, step_tokens, steps_of
from molcli.stages.train.finite import origin
from molcli.stages.train.log import TrainLog, flops_share
from molcli.stages.train.objective import Objective
from molcli.stages.train.optimizer import learning_rate_ratio, set_learning_rates, update
from molcli.stages.train.saver import Saver
from molcli.stages.train.state import TrainState, last_good

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, SIGINT and SIGTERM are noted. A second one acts as if nobody had listened;
    not under torchrun, which sends one more for every Ctrl-C.

    What is ignored, as SIGINT is by what a script starts in its background, stays so. Python gives
    signals to its main thread alone; entered in another one, nothing is noted.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            heard = (n for n in _STOPPING if signal.getsignal(n) is not signal.SIG_IGN)
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal's number, 0 if there was none; the same on every rank, which all must call."""
        if accelerator.num_processes == 1:
            return self.received
        mine = torch.tensor([self.received], device=accelerator.device)
        return int(accelerator.gather(mine).max())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and "LOCAL_WORLD_SIZE" not in os.environ:
            self._restore()
            signal.raise_signal(number)
        self.received = number

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@dataclass(frozen=True)
class Run:
    """What all stages of a run share. total_tokens: of all stages."""

    accelerator: Accelerator
    state: TrainState
    saver: Saver
    log: TrainLog
    loads: RouterLoads
    total_tokens: int
    progress: Progress


def run_stage(
    run: Run,
    stage: Stage,
    objective: Objective | Alignment,
    rows: Corpus,
    identity: dict[str, Any],
) -> None:
    """Trains from state.stage_step to the stage's end.

    identity: of the run, for its checkpoints. Raises Interrupted after a signal, and MolError after
    too many steps in a row without a finite gradient.
    """
    state, config, accelerator = run.state, stage.settings, run.accelerator
    model, name, steps = state.model, f"{state.stage} {stage.kind}", steps_of(config)
    order = rows.order(config.seed + state.stage)
    clock = time.perf_counter() - state.seconds

    def taken(row: int) -> MicroBatches:
        index = order.indices(row, config.batch_size)
        return micro_batches(rows, index, config.micro_batch_size, accelerator)

    parent = objective.parent if isinstance(objective.parent, MoLForCausalLM) else None
    share = flops_share(stage, model, parent, accelerator.num_processes)
    with StopSignals() as stop, run.log.following(state, share):
        ahead = taken(state.row)
        while state.stage_step < steps:
            ratio = learning_rate_ratio(state.stage_step, steps, config)
            set_learning_rates(state.optimizer, ratio)
            _anneal_top_k(run, config)
            batches = ahead
            means = objective.backward(batches, accelerator)
            norm, asked = update(model, state.optimizer, config.clip_norm, accelerator)
            # On a GPU this is the only wait of a step, for the norm: what may come before it does,
            # and while the weights are moved the host goes on to the next step.
            ahead = taken(state.row + config.batch_size)
            finite = asked()
            if finite:
                run.log.add(means)
                run.loads.keep()
                if config.balance == "bias":
                    run.loads.update(config.bias_update_rate, accelerator)
                state.skipped_in_a_row = 0
            else:
                again = partial(objective.is_finite, batches, accelerator)
                trouble = origin(model, again, accelerator)
                run.log.skip(trouble)
                state.skipped += 1
                state.skipped_in_a_row += 1
            run.loads.clear()
            state.optimizer.zero_grad()
            state.step += 1
            state.stage_step += 1
            state.row += config.batch_size
            state.tokens += step_tokens(config)
            state.seconds = time.perf_counter() - clock

            last = state.stage_step == steps
            if state.step % config.log_every == 0 or last or not finite:
                rate = ratio * config.learning_rate
                passes = rows.epochs(state.row)
                run.log.write(state, name, norm, rate, objective.measures, passes)
            if accelerator.is_main_process:
                run.progress(state.tokens, run.total_tokens, run.log.note)
            if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                run.saver.save(state, identity)
            if state.skipped_in_a_row >= config.max_skipped:
                run.saver.finish()
                raise _not_finite(state, run.saver.folder, trouble)
            if number := stop.agreed(accelerator):
                run.saver.save(state, identity)
                run.saver.finish()
                accelerator.wait_for_everyone()  # torchrun kills the rest when one process ends
                raise Interrupted(number, _where(state, name, steps, run.saver.folder))


def _anneal_top_k(run: Run, config: TrainConfig) -> None:
    if config.start_top_k is not None:
        way, model = int(config.top_k_fraction * run.total_tokens), run.state.model
        end = model.config.num_blocks_per_tok
        set_top_k(model, top_k_at(run.state.tokens, way, config.start_top_k, end))


def _where(state: TrainState, name: str, steps: int, checkpoints: Path) -> str:
    return f"step {state.stage_step} of {steps} of stage {name} is saved in {checkpoints}"


def _not_finite(state: TrainState, checkpoints: Path, trouble: str) -> MolError:
    return MolError(
        f"the gradients of {state.skipped_in_a_row} steps in a row were not finite, up to step "
        f"{state.step}; the first value that is not is in {trouble}",
        allowed="fewer than train.max_skipped such steps in a row",
        hint="another output folder with smaller learning rates, or train.precision=fp32; the last "
        f"good checkpoint is {last_good(checkpoints)}",
    )
