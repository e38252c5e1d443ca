"""What the benchmarks of conversions share: cases, calibrations made once, and lines that stay."""

import json
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from molcli.config.recipe import load_recipe
from molcli.config.sections import Recipe
from molcli.io.parent import Parent
from molcli.stages.calibrate import calibrate
from molcli.stages.upcycle import upcycle

logging.disable_progress_bar()  # lines of bars around each line of figures


@dataclass(frozen=True)
class Case:
    """A name, and `section.key=value` texts on top of what all cases share."""

    name: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Case":
        """`name:key=value,key=[1, 2]`; a key without a section is one of `upcycle`."""
        name, _, settings = text.partition(":")
        parts = [part for part in re.split(r",(?=[\w.]+=)", settings) if part]
        keys = [part if "." in part.partition("=")[0] else f"upcycle.{part}" for part in parts]
        return cls(name, tuple(keys))

    def recipe(self, base: str | None, shared: Iterable[str], seed: int) -> Recipe:
        """The seed draws documents, clusters and the order of training."""
        seeds = [f"calibrate.seed={seed}", f"train.seed={seed}"]
        return load_recipe(base, [*shared, *self.overrides, *seeds])


@dataclass
class Workshop:
    """Converts one parent on one text in a scratch folder; calibrations are kept for later ones."""

    parent: Parent
    data: str
    folder: Path
    _calibrations: dict[Any, tuple[Path, float]] = field(default_factory=dict)

    def calibration(self, recipe: Recipe) -> tuple[Path, float]:
        """Its folder, and the seconds that it took."""
        about = recipe.calibrate
        if about not in self._calibrations:
            out = self.folder / f"calibration-{len(self._calibrations)}"
            settings = replace(about, data=self.data)
            _, seconds, _ = measured(lambda: calibrate(self.parent, settings, out))
            self._calibrations[about] = out, seconds
        return self._calibrations[about]

    def convert(self, recipe: Recipe) -> tuple[Path, dict[str, Any]]:
        """The checkpoint, which the next conversion overwrites, and figures of the conversion."""
        calibration, calibrating = self.calibration(recipe)
        out = self.folder / "converted"
        shutil.rmtree(out, ignore_errors=True)
        _, seconds, peak = measured(lambda: upcycle(self.parent, calibration, recipe, out))
        receipt = json.loads((out / "receipt.json").read_text())
        heldout, size = receipt["heldout"], receipt["parameters"]
        return out, {
            "calibration_tokens": receipt["calibration"]["tokens"],
            "gap": heldout["ce"] - heldout["parent_ce"],
            "kl": heldout["kl"],
            "tokens": heldout["tokens"],
            "total": size["total"],
            "active": size["active"],
            "parent_total": size["parent"],
            "seconds": round(seconds, 1),
            "calibration_seconds": round(calibrating, 1),
            "peak_gb": peak,
        }


def measured(work: Callable[[], Any]) -> tuple[Any, float, float | None]:
    """What it returns, its seconds, and the peak of the GPU's memory in GB, None without one."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = work()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return found, seconds, round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None


@dataclass(frozen=True)
class Lines:
    """JSON lines, printed and appended to a file as they come. A run that was cut off goes on:
    what the file has is not done again."""

    path: Path | None

    def known(self) -> list[dict[str, Any]]:
        """Lines of earlier runs that are whole and without an error."""
        if self.path is None or not self.path.is_file():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last one of a killed run
                continue
            if "error" not in row:
                found.append(row)
        return found

    def add(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Its figures, or {"error": ...}: one case out of memory must not end the others."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}".splitlines()[0]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"error": text}
