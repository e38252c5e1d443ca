"""Results of a benchmark as JSON lines; an interrupted benchmark resumes from them."""

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from molcli.errors import Interrupted
from molcli.model.checkpoint import default_device
from molcli.report.machine import commit, device_name, versions


@dataclass
class JsonLines:
    """Rows of results, printed and appended to a file. Rows that the file has are not run again.

    Attributes:
        path: the file, if there is one.
        rows: rows of this run without an error, including those read from the file.
    """

    path: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def known(self) -> list[dict[str, Any]]:
        """Return the complete rows of earlier runs without an error."""
        if self.path is None or not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a killed run
                continue
            if "error" not in row:
                rows.append(row)
        return rows

    def row(
        self,
        key: dict[str, Any],
        work: Callable[[], dict[str, Any]],
        complete: Callable[[dict[str, Any]], bool] = lambda _: True,
    ) -> None:
        """Add a row with the key, the figures of `work` or "error", the command and the machine.

        An error, such as a lack of memory, does not stop the other cases. If the file has the row,
        and `complete` says that all figures are there, `work` does not run.
        """
        done = [row for row in self.known() if key.items() <= row.items() and complete(row)]
        if done:
            self.rows.append(done[-1])
            return
        row = key | _attempt(work) | {"command": " ".join(sys.argv)} | machine()
        self.add(row)
        if "error" not in row:
            self.rows.append(row)

    def add(self, row: dict[str, Any]) -> None:
        """Print a row and append it to the file."""
        line = json.dumps(row)
        print(line, flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def measured(work: Callable[[], Any]) -> tuple[Any, float, float | None]:
    """Run `work`. Return its result, seconds, and peak GPU memory in GB (None without a GPU)."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    seconds = round(time.perf_counter() - start, 1)
    return result, seconds, round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None


def machine() -> dict[str, str]:
    """Return device, commit and versions of a measurement."""
    return {"device": device_name(default_device()), "commit": commit() or "unknown", **versions()}


def _attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except Interrupted:  # a signal stops all cases
        raise
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}".splitlines()[0]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"error": text}
