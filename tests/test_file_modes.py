"""All files and folders that a command writes have the permissions of the user's umask."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forked import Forked

SETTINGS = {
    "upcycle.num_blocks": 3,
    "upcycle.top_k": 1,
    "upcycle.d_thin": 32,
    "calibrate.tokens": 512,
    "calibrate.heldout_tokens": 128,
    "calibrate.context_length": 32,
    "train.tokens": 256,
    "train.context_length": 32,
    "train.batch_size": 4,
    "train.stages": "null",
    "train.checkpoint_every": 1,
    "evaluate.context_length": 32,
    "sample.tokens": 64,
    "sample.length": 16,
}
SETS = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]


def set_umask(mask: int) -> None:
    os.umask(mask)


def modes(folder: Path) -> dict[str, int]:
    found = [folder, *folder.rglob("*")] if folder.is_dir() else [folder]
    return {str(path.relative_to(folder.parent)): path.stat().st_mode & 0o777 for path in found}


@pytest.mark.parametrize("mask", [0o027, 0o002])
def test_outputs_follow_the_umask(
    forked: Forked, tiny_parent: Callable[..., Path], tmp_path: Path, mask: int
) -> None:
    parent = tiny_parent("llama")
    generator = random.Random(0)
    rows = [{"input_ids": [generator.randrange(3, 120) for _ in range(30)]} for _ in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 20)
    for path in (tmp_path, *tmp_path.rglob("*"), *parent.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o600)  # what is copied does not keep its mode
    data = ["--data", "text.jsonl"]
    commands = {
        "calibrated": ["calibrate", parent, "calibrated", *data, *SETS],
        "mol": ["upcycle", parent, "mol", "--calibration", "calibrated", *SETS],
        "converted": ["convert", "mol", "converted", "--gated-deltanet", "all", *data, *SETS],
        "trained": ["train", "mol", "trained", "--parent", parent, *data, *SETS],
        "tokens": ["data", "tokenize", "text.txt", "tokens", "-t", parent],
        "sampled.jsonl": ["data", "sample", parent, "sampled.jsonl", *SETS],
        "logits": ["data", "cache-logits", parent, "logits", *data, "--top-k", "5", *SETS],
        "figures.json": ["plan", parent, "--json", "figures.json"],
    }
    cache = tmp_path / "cache"
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(cache)}
    for out, words in commands.items():
        done = forked.run(
            words, tmp_path, env=environment, setup="tests.test_file_modes:set_umask", payload=mask
        )
        assert done.code == 0, done.stderr
        wanted = {
            name: (0o777 if (tmp_path / name).is_dir() else 0o666) & ~mask
            for name in modes(tmp_path / out)
        }
        assert modes(tmp_path / out) == wanted
