"""What a run tells: one JSON line per window of steps, and a few words for the progress bar."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from molcli.stages.train.state import TrainState

LOG = "log.jsonl"


class TrainLog:
    """Means over the steps since the last line.

    A line has: step, tokens, seconds, stage (its number and kind, such as "0 align"), loss (what is
    minimised), ce and kl (nats a token; null where the stage has none), balance (CV^2, mean of
    layers), learning_rate (inherited weights'), gradient_norm (before clipping, of the last step),
    tokens_per_second, skipped (in all), not_finite (where that began in the window's last skipped
    step, or null), passes (over each source of the stage's data, since the stage began).
    """

    def __init__(self, out: Path, accelerator: Accelerator, state: TrainState) -> None:
        self.path, self.accelerator = out / LOG, accelerator
        self.note = ""
        self._trouble = ""
        self._sums = torch.zeros(4, device=accelerator.device)
        self._steps, self._tokens, self._seconds = 0, state.tokens, state.seconds
        if accelerator.is_main_process:
            self._drop_lines_after(state.step)

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
        values = [total / self._steps if self._steps else None for total in sums.tolist()]
        names = ("loss", "ce", "kl", "balance")
        line = {n: x if n in measures else None for n, x in zip(names, values, strict=True)}
        rate = (state.tokens - self._tokens) / max(state.seconds - self._seconds, 1e-9)
        state.loss = line["loss"] if line["loss"] is not None else state.loss
        self.note = _note(stage, line, rate, state.skipped, self._trouble, passes)
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
                "skipped": state.skipped,
                "not_finite": self._trouble or None,
                "passes": passes,
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(whole) + "\n")
        self._trouble = ""
        self._sums = torch.zeros_like(self._sums)
        self._steps, self._tokens, self._seconds = 0, state.tokens, state.seconds

    def _drop_lines_after(self, step: int) -> None:
        """What came after the checkpoint is written again; a kill may have cut the last line."""
        if self.path.is_file():
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self.path.write_text("".join(line + "\n" for line in kept))


def _note(
    stage: str,
    line: dict[str, float | None],
    rate: float,
    skipped: int,
    trouble: str,
    passes: dict[str, float],
) -> str:
    words = [stage]
    words += [f"{name} {value:.3f}" for name, value in line.items() if value is not None]
    words.append(f"{rate:,.0f} tokens/s")
    if skipped:
        words.append(f"{skipped} steps skipped" + (f" for {trouble}" if trouble else ""))
    words += [
        f"{count:.1f} passes over {Path(source).name}"
        for source, count in passes.items()
        if count > 1
    ]
    return ", ".join(words)
