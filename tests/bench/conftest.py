"""Fixtures of the tests of this folder."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts
from conversions import ConversionRunner

from molcli.families.parent import open_parent


@pytest.fixture
def parent(tiny_parent):
    return tiny_parent("llama", num_hidden_layers=4)


@pytest.fixture
def texts(tmp_path):
    """--data and --heldout."""
    found = []
    for name, count in (("data", 40), ("heldout", 6)):
        rows = [[1, *((7 * i + j * j) % 100 + 3 for j in range(20))] for i in range(count)]
        lines = [json.dumps({"input_ids": row}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        found += [f"--{name}", str(tmp_path / f"{name}.jsonl")]
    return found


@pytest.fixture
def runner(parent, texts, tmp_path):
    (tmp_path / "work").mkdir()
    return ConversionRunner(open_parent(parent), texts[1], tmp_path / "work", {"heldout": texts[3]})
