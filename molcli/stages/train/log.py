"""The log of a run: one JSON line per window of steps, a few words for the bar, forecasts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage
from molcli.estimate.flops import training_flops
from molcli.estimate.gpus import bf16_peak
from molcli.maths.recovery import tokens_to_recovery
from molcli.model import MoLForCausalLM
from molcli.model.precision import matmul_dtype
from molcli.report.machine import device_name
from molcli.report.training import training_page
from molcli.stages.train.balance import RouterLoads
from molcli.stages.train.state import TrainState
from molcli.stages.train.trackers import show, tracked

GOALS = (0.5, 0.75, 0.9, 0.95, 0.99)
"""Recoveries, 1 - KL / KL at the start, of which the next one ahead is forecast."""


class RecoveryCurve:
    """The KL of all stages that measure it; tokens count from where the first of them begins."""

    def __init__(self) -> None:
        self._before = 0
        self._tokens: list[float] = []
        self._kl: list[float] = []

    def add(self, line: dict[str, Any]) -> None:
        """line: of the log, in its order."""
        if line["kl"] is not None:
            self._tokens.append(line["tokens"] - self._before)
            self._kl.append(line["kl"])
        elif not self._kl:
            self._before = line["tokens"]

    def words(self) -> str:
        """Such as "50% recovered in 1.2M tokens"; empty where nothing can be forecast."""
        for goal in GOALS:
            left = tokens_to_recovery(self._tokens, self._kl, goal)
            if left is None:
                return ""
            if left > 0:
                return f"{goal:.0%} recovered in {_short(left)} tokens"
        return ""


def _short(count: float) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:.0f}"


def flops_share(
    stage: Stage, model: MoLForCausalLM, parent: MoLForCausalLM | None, ranks: int
) -> float | None:
    """Model FLOPs utilisation at one token a second; None unless the devices' peak is known.

    Counts active blocks, at the checkpoint's own number, and forward passes once: what gradient
    checkpointing repeats is no use. A trained weight counts 6, a frozen one 4 or 2, as
    `training_flops` says. parent: that the stage runs.
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


LOG, PAGE = "log.jsonl", "train.html"


class TrainLog:
    """Means over the steps since the last line.

    A line has: step, tokens, seconds, stage (its number and kind, such as "0 align"), loss (what is
    minimised), ce and kl (nats a token; null where the stage has none), balance (CV^2, mean of
    layers), learning_rate (inherited weights'), gradient_norm (before clipping, of the last step),
    tokens_per_second, mfu (of active FLOPs; null where the devices' peak is not known), routing
    (by the number of each layer that routes, the tokens of its least and its most used block, where
    1 is an even load; null without a router), skipped (in all), not_finite (where that began in the
    window's last skipped step, or null), passes (over each source of the stage's data, since the
    stage began).
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
        self._trouble = ""
        self._flops_share: float | None = None
        self._recovery = RecoveryCurve()
        self._sums = torch.zeros(4, device=accelerator.device)
        self._steps, self._tokens, self._seconds = 0, state.tokens, state.seconds
        if accelerator.is_main_process:
            self._drop_lines_after(state.step)
            for line in self._lines():
                self._recovery.add(line)

    @contextmanager
    def following(self, state: TrainState, flops_share: float | None) -> Iterator[None]:
        """Around the steps of a stage: trackers follow them, and the page shows them at the end,
        of whatever kind it is. flops_share: `molcli.stages.train.log.flops_share`."""
        self._flops_share = flops_share
        with tracked(self.accelerator, self.config, self.out, state.step):
            try:
                yield
            finally:
                if self.accelerator.is_main_process:
                    # A full disk has an error of its own on the way, or will have.
                    with suppress(OSError):
                        page = training_page(self._lines(), self.config)
                        (self.out / PAGE).write_text(page, encoding="utf-8")

    def add(self, means: Tensor) -> None:
        """means: (4,) this rank's part of a step's mean loss, ce, kl and balance."""
        self._sums = self._sums + means
        self._steps += 1

    def skip(self, trouble: str) -> None:
        """A step was left out. trouble: where the first value that is not finite came up."""
        self._trouble = trouble

    def write(
        self,
        state: TrainState,
        stage: str,
        norm: Tensor,
        learning_rate: float,
        measures: tuple[str, ...],
        passes: dict[str, float],
    ) -> None:
        """Ends a window; every rank calls it, the main one writes. measures: those not null."""
        sums = self.accelerator.reduce(self._sums, "sum")
        routing = _routing(self.loads.layers, self.loads.take_window(self.accelerator))
        values = [total / self._steps if self._steps else None for total in sums.tolist()]
        names = ("loss", "ce", "kl", "balance")
        line = {n: x if n in measures else None for n, x in zip(names, values, strict=True)}
        rate = (state.tokens - self._tokens) / max(state.seconds - self._seconds, 1e-9)
        state.loss = line["loss"] if line["loss"] is not None else state.loss
        if self.accelerator.is_main_process:
            whole = {
                "step": state.step,
                "tokens": state.tokens,
                "seconds": state.seconds,
                "stage": stage,
                **line,
                "learning_rate": learning_rate,
                "gradient_norm": float(norm) if torch.isfinite(norm) else None,
                "tokens_per_second": rate,
                "mfu": None if self._flops_share is None else self._flops_share * rate,
                "routing": routing,
                "skipped": state.skipped,
                "not_finite": self._trouble or None,
                "passes": passes,
            }
            with (self.out / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(whole) + "\n")
            show(self.accelerator, whole)
            self._recovery.add(whole)
            self.note = _note(whole, self._recovery.words() if line["kl"] is not None else "")
        self._trouble = ""
        self._sums = torch.zeros_like(self._sums)
        self._steps, self._tokens, self._seconds = 0, state.tokens, state.seconds

    def _drop_lines_after(self, step: int) -> None:
        """What came after the checkpoint is written again; a kill may have cut the last line."""
        if (self.out / LOG).is_file():
            kept = [json.dumps(line) for line in self._lines() if line["step"] <= step]
            (self.out / LOG).write_text("".join(line + "\n" for line in kept))

    def _lines(self) -> list[dict[str, Any]]:
        if not (self.out / LOG).is_file():
            return []
        lines = (self.out / LOG).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if _is_whole(line)]


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _routing(layers: list[int], counts: Tensor) -> dict[str, list[float]] | None:
    """counts: (layers, blocks) tokens."""
    counts = counts.double().cpu()
    if not counts.any():
        return None
    even = counts / counts.mean(-1, keepdim=True)
    ends = torch.stack([even.amin(-1), even.amax(-1)], dim=-1).tolist()
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
        trouble = f" for {line['not_finite']}" if line["not_finite"] else ""
        words.append(f"{line['skipped']} steps skipped{trouble}")
    words += [
        f"{count:.1f} passes over {Path(source).name}"
        for source, count in line["passes"].items()
        if count > 1
    ]
    return ", ".join(words)
