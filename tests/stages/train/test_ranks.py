"""Two processes train as one does."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from molcli.config.recipe import save_recipe
from molcli.config.sections import Recipe, TrainConfig
from molcli.stages.train import train

WORKER = """
import sys
from pathlib import Path
from molcli.config.recipe import load_recipe
from molcli.stages.train import train
checkpoint, out, data, recipe = sys.argv[1:]
train(Path(checkpoint), Path(out), data, load_recipe(recipe))
"""


def test_two_ranks_learn_what_one_learns(
    tiny_mol: Callable[..., Path], corpus: Callable[..., str], tmp_path: Path
) -> None:
    """Same global batch, same micro-batches: the same sums, in another order."""
    checkpoint, data = tiny_mol(), corpus()
    recipe = Recipe(
        train=TrainConfig(
            tokens=4 * 4 * 32,
            context_length=32,
            batch_size=4,
            micro_batch_size=1,
            checkpoint_every=2,
            log_every=2,
            precision="fp32",
        )
    )
    train(checkpoint, tmp_path / "one", data, recipe)

    save_recipe(recipe, tmp_path / "recipe.yaml")
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["worker.py", checkpoint, tmp_path / "two", data, "recipe.yaml"]
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [*launch, *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        # Four steps of at most 4e-4 each: a rank's share lost or doubled would show in Adam's sign.
        assert two[name].sub(tensor).abs().max() < 1e-5, name
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(logs[1]) == 2
    for ours, theirs in zip(*logs, strict=True):
        for name in ("loss", "ce", "balance", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
