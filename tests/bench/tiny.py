"""Settings of the tests of this folder: conversions of a tiny parent."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts
from conversions import Case

from molcli.config.sections import Recipe

SMALL = [
    "upcycle.num_blocks=3",
    "upcycle.top_k=1",
    "upcycle.d_thin=32",
    "calibrate.tokens=256",
    "calibrate.heldout_tokens=64",
    "calibrate.context_length=32",
    "train.context_length=32",
    "train.batch_size=4",
    "evaluate.context_length=32",
]
SET = [word for setting in SMALL for word in ("--set", setting)]


def recipe(*settings: str, seed: int = 0) -> Recipe:
    return Case("", settings).recipe(None, SMALL, seed)
