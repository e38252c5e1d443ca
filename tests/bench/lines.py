"""JSON lines of a benchmark that may be cut off, and goes on where it was."""

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import machine

from molcli.errors import Interrupted


@dataclass
class Lines:
    """Rows, printed and appended to a file as they come; what the file has is not done again.

    rows: of this run, known ones too; without an error.
    """

    path: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

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

    def row(self, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        """One row: the key, the figures of `work`, or "error", and what they were measured with.

        One case out of memory must not end the others. A row that is known is not made again.
        """
        done = [row for row in self.known() if key.items() <= row.items()]
        if done:
            self.rows.append(done[0])
            return
        found = _attempt(work)
        row = key | found | {"command": " ".join(sys.argv)} | machine()
        self.add(row)
        if "error" not in row:
            self.rows.append(row)

    def add(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except Interrupted:  # a signal ends all cases, not this one
        raise
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}".splitlines()[0]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"error": text}


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
    seconds = round(time.perf_counter() - start, 1)
    return found, seconds, round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None
