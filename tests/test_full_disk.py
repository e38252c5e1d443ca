"""Full disks where numpy and torch write: they report them in words of their own."""

import json
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Forked

SETTINGS = {
    "upcycle.num_blocks": 3,
    "upcycle.top_k": 1,
    "upcycle.d_thin": 32,
    "train.tokens": 128,
    "train.context_length": 32,
    "train.stages": "null",
}
SETS = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
TRAIN = ["mol", "out", "--parent", "parent", "--data", "text.jsonl"]
LIMIT = 2500  # bytes: above what a command prints here, below its output


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond a size, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture
def world(tiny_parent: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with the inputs of the commands."""
    folder = tmp_path / "world"
    folder.mkdir()
    tiny_parent("llama").rename(folder / "parent")
    draw = random.Random(0)
    rows = [{"input_ids": [draw.randrange(3, 120) for _ in range(30)]} for _ in range(40)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text.txt").write_text("the quick brown fox\n" * 2000)
    return folder


def run(forked: Forked, folder: Path, words: list[str], **fields: Any) -> tuple[int, str]:
    places = {"HOME": str(folder), "TMPDIR": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    done = forked.run(words, folder, env=places, **fields)
    return done.code, done.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["data", "tokenize", "text.txt", "out", "-t", "parent"], "tokens-00000.npy"),
        (["train", *TRAIN, *SETS], "written to out"),
        (["train", *TRAIN, *SETS, "--set", "train.checkpoint_every=1"], "a part of it only"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_full_disk_is_refused_with_the_file(
    forked: Forked, world: Path, words: list[str], named: str
) -> None:
    if words[0] == "train":
        made = ["upcycle", "parent", "mol", "--set", "upcycle.method=random", *SETS]
        code, printed = run(forked, world, made)
        assert code == 0, printed
    before = {path.name for path in world.iterdir()}
    full = {"setup": f"{__name__}:limit_files", "payload": LIMIT}
    code, printed = run(forked, world, words, **full)
    error = printed[printed.index("error: ") :]
    assert code == 2, printed
    assert named in error.splitlines()[0]
    assert "try: " in error
    resumed = {"out"} if words[0] == "train" else set()
    assert {path.name for path in world.iterdir()} - before - {"cache"} <= resumed
    again = ["--resume"] if (world / "out").exists() else []
    code, printed = run(forked, world, words + again)
    assert code == 0, printed
    assert (world / "out").exists()
