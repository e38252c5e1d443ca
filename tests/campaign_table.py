"""What the campaigns of tests print at their end: a table, and where it comes from."""

import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.forked import Forked


def print_table(first: str, heads: Sequence[str], rows: Mapping[str, Counter[str]]) -> None:
    """Print counts. first: the head of the column of names. rows: name -> count by head."""
    cells = [[first, *heads]]
    cells += [[name, *(str(counts[head]) for head in heads)] for name, counts in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *others in cells:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *right]))


def print_origin(seed: int, seconds: float, forked: Forked) -> None:
    """Print seed, commit, processor, duration and versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    print(f"seed {seed}, commit {commit.stdout.strip()}, {_cpu()}, {seconds:.0f} s")
    about = forked.run(["--version"], "/").stdout
    print("; ".join(line.strip() for line in about.splitlines() if line.strip()))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    models = [line.partition(": ")[2] for line in text.splitlines() if "model name" in line]
    return f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}"
