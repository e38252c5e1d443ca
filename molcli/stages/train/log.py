"""The log of a run: log.jsonl, the note of the progress bar, train.html, and trackers."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage
from molcli.errors import MolError
from molcli.estimate.flops import training_flops
from molcli.estimate.gpus import bf16_peak
from molcli.maths.recovery import tokens_to_recovery
from molcli.model import MoLForCausalLM
from molcli.model.precision import matmul_dtype
from molcli.report.machine import device_name
from molcli.report.training import training_page
from molcli.stages.train.balance import RouterLoads
from molcli.stages.train.log_file import LOG, PAGE, drop_lines_after, read_log
from molcli.stages.train.state import TrainState
from molcli.stages.train.trackers import open_trackers, send_to_trackers

# Recoveries, 1 - KL / KL at the start; the next one that is not reached is forecast.
_GOALS = (0.5, 0.75, 0.9, 0.95, 0.99)
_LOSSES = ("loss", "ce", "kl", "balance")


class TrainLog:
    """Writes one JSON line for each window of steps.

    A line has:
        step, tokens, seconds: so far.
        stage: its number and kind, such as "0 align".
        loss: what is minimised, mean over the steps of the window.
        ce, kl: nats for each token; null where the stage has none.
        balance: CV^2, mean over layers.
        learning_rate: of inherited weights.
        gradient_norm: before clipping, of the last step.
        tokens_per_second: in the window.
        mfu: model FLOPs utilisation, of active blocks; null where the device's peak is not known.
        routing: for the number of each layer that routes, the tokens of its least and its most used
            block, where 1 is an even load; null without a router.
        skipped: steps skipped so far.
        not_finite: where the first non-finite value of the window's last skipped step is, or which
            mean over the window is not finite, or null.
        passes: over each source of the stage's data, since the stage began; null for a source of
            which the run reads a part of unknown size, and for "repeats", whose rows are new ones.
    All numbers are finite: where one would not be, it is null, and not_finite names it.

    Attributes:
        out: folder of the run.
        note: a few words about the last line, for the progress bar.
    """

    def __init__(
        self,
        out: Path,
        accelerator: Accelerator,
        state: TrainState,
        config: TrainConfig,
        loads: RouterLoads,
    ) -> None:
        self.out, self.accelerator = out, accelerator
        self.config, self.loads = config, loads
        self.note = ""
        self._not_finite = ""
        self._mfu_scale: float | None = None
        self._recovery = RecoveryCurve()
        self._sums = torch.zeros(len(_LOSSES), device=accelerator.device)
        self._steps, self._tokens, self._seconds = 0, state.tokens, state.seconds
        if accelerator.is_main_process:
            drop_lines_after(out / LOG, state.step)
            for line in read_log(out / LOG):
                self._recovery.add(line)

    @contextmanager
    def open_stage(self, state: TrainState, mfu_scale: float | None) -> Iterator[None]:
        """Log the steps of a stage inside this context; write the page at its end, on errors, too.

        Args:
            state: at the beginning of the steps.
            mfu_scale: from the function of this name.

        Raises:
            MolError: for a tracker that cannot be started.
        """
        self._mfu_scale = mfu_scale
        with open_trackers(self.accelerator, self.config, self.out, state.step):
            try:
                yield
            finally:
                self.write_page()

    def write_page(self) -> None:
        """Write train.html on the main rank; not where log.jsonl is missing or cannot be read."""
        if self.accelerator.is_main_process and (self.out / LOG).exists():
            with suppress(OSError, MolError):  # a full disk raises elsewhere, before or after this
                page = training_page(read_log(self.out / LOG), self.config)
                (self.out / PAGE).write_text(page, encoding="utf-8")

    def add_step(self, means: Tensor) -> None:
        """Add a step. means: (4,) this rank's part of its mean loss, ce, kl and balance."""
        self._sums = self._sums + means
        self._steps += 1

    def skip_step(self, not_finite: str) -> None:
        """Record a skipped step. not_finite: where its first non-finite value is."""
        self._not_finite = not_finite

    def write(
        self,
        state: TrainState,
        stage: str,
        norm: Tensor,
        learning_rate: float,
        metrics: tuple[str, ...],
        passes: dict[str, float | None],
    ) -> None:
        """End a window and write its line on the main rank. Collective.

        Args:
            state: after the last step; its `loss` is updated.
            stage: number and kind.
            norm: 0-d, of the gradients of the last step.
            learning_rate: of inherited weights.
            metrics: which of loss, ce, kl and balance are not null.
            passes: over each source of the data, None where that is unknown.
        """
        sums = self.accelerator.reduce(self._sums, "sum")
        routing = _routing(self.loads.layers, self.loads.pop_window(self.accelerator))
        means = [_finite(total / self._steps) if self._steps else None for total in sums.tolist()]
        losses = {n: x if n in metrics else None for n, x in zip(_LOSSES, means, strict=True)}
        if self._steps and not self._not_finite:
            # A sum may overflow, or the loss, while its gradients do not.
            lost = [name for name in metrics if losses[name] is None]
            self._not_finite = f"the mean {lost[0]}" if lost else ""
        rate = (state.tokens - self._tokens) / max(state.seconds - self._seconds, 1e-9)
        state.loss = losses["loss"] if losses["loss"] is not None else state.loss
        if self.accelerator.is_main_process:
            line = {
                "step": state.step,
                "tokens": state.tokens,
                "seconds": state.seconds,
                "stage": stage,
                **losses,
                "learning_rate": learning_rate,
                "gradient_norm": _finite(float(norm)),
                "tokens_per_second": rate,
                "mfu": None if self._mfu_scale is None else self._mfu_scale * rate,
                "routing": routing,
                "skipped": state.skipped,
                "not_finite": self._not_finite or None,
                "passes": passes,
            }
            with (self.out / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            send_to_trackers(self.accelerator, line)
            self._recovery.add(line)
            self.note = _note(line, self._recovery.forecast() if losses["kl"] is not None else "")
        self._not_finite = ""
        self._sums = torch.zeros_like(self._sums)
        self._steps, self._tokens, self._seconds = 0, state.tokens, state.seconds


class RecoveryCurve:
    """The KL in all stages that measure it; tokens count from the beginning of the first one."""

    def __init__(self) -> None:
        self._first_token = 0
        self._tokens: list[float] = []
        self._kl: list[float] = []

    def add(self, line: dict[str, Any]) -> None:
        """Add the next line of the log."""
        if line["kl"] is not None:
            self._tokens.append(line["tokens"] - self._first_token)
            self._kl.append(line["kl"])
        elif not self._kl:
            self._first_token = line["tokens"]

    def forecast(self) -> str:
        """Return words such as "50% recovered in 1.2M tokens", "" where there is no forecast."""
        for goal in _GOALS:
            left = tokens_to_recovery(self._tokens, self._kl, goal)
            if left is None:
                return ""
            if left > 0:
                return f"{goal:.0%} recovered in {_short(left)} tokens"
        return ""


def mfu_scale(
    stage: Stage, model: MoLForCausalLM, parent: MoLForCausalLM | None, ranks: int
) -> float | None:
    """Return the model FLOPs utilisation at one token a second.

    Counts active blocks, at the checkpoint's own number, and each forward pass once: what gradient
    checkpointing repeats is not counted. A trained weight counts 6, a frozen one 4 or 2, as in
    `training_flops`.

    Args:
        stage: that runs.
        model: that is trained.
        parent: if the stage runs it.
        ranks: processes, each with one device.

    Returns:
        None if the peak of the devices is not known, or if matrix products are not in bf16.
    """
    device = next(model.parameters()).device
    peak = bf16_peak(device_name(device))
    if peak is None or matmul_dtype(stage.settings, device) != torch.bfloat16:
        return None
    flops = training_flops(
        model.config,
        stage.settings.context_length,
        parent=None if parent is None else parent.config,
        trainable=stage.settings.trainable,
        layerwise=stage.kind == "align",
    )
    return flops / (peak * ranks)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _routing(layers: list[int], counts: Tensor) -> dict[str, list[float]] | None:
    """The entry `routing` of a line. counts: (layers, blocks) tokens."""
    counts = counts.double().cpu()
    if not counts.any():
        return None
    # A layer without a token has no mean to divide by.
    relative = (counts / counts.mean(-1, keepdim=True)).nan_to_num(0.0)
    ends = torch.stack([relative.amin(-1), relative.amax(-1)], dim=-1).tolist()
    return {str(n): [round(x, 3) for x in pair] for n, pair in zip(layers, ends, strict=True)}


def _note(line: dict[str, Any], recovery: str) -> str:
    words = [line["stage"]]
    words += [f"{name} {line[name]:.3f}" for name in ("loss", "kl") if line[name] is not None]
    words.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    if line["mfu"] is not None:
        words.append(f"MFU {line['mfu']:.1%}")
    if line["balance"] is not None:
        words.append(f"balance {line['balance']:.3f}")
    if recovery:
        words.append(recovery)
    if line["skipped"]:
        cause = f" for {line['not_finite']}" if line["not_finite"] else ""
        words.append(f"{line['skipped']} steps skipped{cause}")
    words += [
        f"{count:.1f} passes over {Path(source).name}"
        for source, count in line["passes"].items()
        if count is not None and count > 1
    ]
    return ", ".join(words)


def _short(count: float) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:.0f}"
