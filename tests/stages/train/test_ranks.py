"""Two processes train as one does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from molcli.config.recipe import save_recipe
from molcli.config.sections import Recipe, StageConfig, TrainConfig
from molcli.families.parent import Parent
from molcli.stages.train import train

WORKER = """
import os, signal, sys
from pathlib import Path
from torch.distributed.checkpoint import filesystem
from molcli.config.recipe import load_recipe
from molcli.errors import Interrupted
from molcli.data.order import MixedOrder
from molcli.families.parent import open_parent
from molcli.stages.train import train
checkpoint, data, parent, *runs = sys.argv[1:]
indices = MixedOrder.indices
filesystem._OverlappingCpuLoader = None  # torch's way to read ahead, by the first GPU's stream

def stopped(self, first, count):
    if os.environ["RANK"] == "1" and first == 8:  # by the second step, for the third
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # torchrun may repeat it
    return indices(self, first, count)

for recipe, out, how in zip(runs[::3], runs[1::3], runs[2::3]):
    dense = open_parent(parent) if "stages" in recipe else None
    MixedOrder.indices = stopped if how == "stop" else indices
    try:
        run = Path(checkpoint), Path(out), data, load_recipe(recipe), dense
        train(*run, resume=how == "resume")
    except Interrupted as error:
        assert (how, error.signal) == ("stop", signal.SIGTERM)
    else:
        assert how != "stop"
"""


def short_recipe() -> Recipe:
    """Four steps of four rows of 32, a checkpoint after every second."""
    return Recipe(
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


class Stopped(Exception):
    pass


def stop_after_three_steps(done: int, total: int | None, note: str = "") -> None:
    if note and done == 3 * 4 * 32:
        raise Stopped


def test_two_ranks_learn_what_one_learns(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    dense_parent: Parent,
    tmp_path: Path,
) -> None:
    """Same global batch, same micro-batches: the same sums, in another order. So for every kind of
    stage, for runs that begin with one rank and continue with two or the other way round, and for a
    run in which one rank got a signal."""
    checkpoint, data = tiny_mol(), corpus()
    recipe = short_recipe()
    steps = 2 * 4 * 32
    kinds = [
        StageConfig("align", tokens=steps),
        StageConfig("distill", tokens=steps, trainable="mol"),
        StageConfig("pretrain", tokens=steps),
    ]
    again = replace(recipe.train, stages=kinds, gradient_checkpointing=True)
    staged = replace(recipe, train=again)
    train(checkpoint, tmp_path / "one", data, recipe)
    train(checkpoint, tmp_path / "one-staged", data, staged, dense_parent)
    with pytest.raises(Stopped):
        train(checkpoint, tmp_path / "two-resumed", data, recipe, progress=stop_after_three_steps)

    save_recipe(recipe, tmp_path / "recipe.yaml")
    save_recipe(staged, tmp_path / "stages.yaml")
    # Two micro-batches for each step and rank; the first reduces no gradients.
    once = replace(recipe, train=replace(again, sharding="optimizer"))
    save_recipe(once, tmp_path / "once-stages.yaml")
    # A rank's part of a batch is two rows, fewer than its micro-batch may have.
    wide = [replace(recipe, train=replace(recipe.train, micro_batch_size=n)) for n in (2, 4)]
    train(checkpoint, tmp_path / "one-wide", data, wide[0])
    save_recipe(wide[1], tmp_path / "wide.yaml")
    arguments = [checkpoint, data, dense_parent.folder, "wide.yaml", "two-wide", "fresh"]
    arguments += ["recipe.yaml", "two", "fresh", "stages.yaml", "two-staged", "fresh"]
    arguments += ["recipe.yaml", "two-resumed", "resume"]
    arguments += ["recipe.yaml", "two-stopped", "stop", "recipe.yaml", "two-stopped", "resume"]
    arguments += ["stages.yaml", "one-resumed", "stop", "once-stages.yaml", "two-once", "fresh"]
    run_ranks(2, tmp_path, arguments, {"CUDA_VISIBLE_DEVICES": ""})
    train(checkpoint, tmp_path / "one-resumed", data, staged, dense_parent, resume=True)
    for two in ("two-staged", "one-resumed", "two-once"):
        compare(tmp_path / "one-staged", tmp_path / two)
    for two in ("two", "two-resumed", "two-stopped"):
        compare(tmp_path / "one", tmp_path / two)
    compare(tmp_path / "one-wide", tmp_path / "two-wide")
    # Model and moments are sharded in two, and so are shared blocks and the dense layer.
    parts = (tmp_path / "two" / "checkpoints" / "step-00000004").glob("*.distcp")
    smaller, larger = sorted(part.stat().st_size for part in parts)
    assert larger < 1.3 * smaller


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_learn_what_one_learns(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    dense_parent: Parent,
    tmp_path: Path,
) -> None:
    """In two stages, in bf16; and one GPU continues a run that two have begun."""
    # Variables that find the driver and its libraries, and settings of NCCL.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "OMP_", "PYTHON"))
    }
    recipe = short_recipe()
    kinds = [StageConfig(kind, tokens=2 * 4 * 32) for kind in ("align", "distill")]
    settings = replace(recipe.train, stages=kinds, precision="bf16", log_every=1)
    save_recipe(replace(recipe, train=settings), tmp_path / "stages.yaml")
    given = [tiny_mol(), corpus(), dense_parent.folder]
    run_ranks(1, tmp_path, [*given, "stages.yaml", "one", "fresh"], environment)
    run_ranks(2, tmp_path, [*given, "stages.yaml", "two", "fresh"], environment)
    run_ranks(2, tmp_path, [*given, "stages.yaml", "resumed", "stop"], environment)
    run_ranks(1, tmp_path, [*given, "stages.yaml", "resumed", "resume"], environment)

    def losses(name: str) -> list[float]:
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    assert len(losses("one")) == 4
    for name in ("two", "resumed"):
        assert losses(name) == pytest.approx(losses("one"), rel=1e-2)


def run_ranks(
    count: int, folder: Path, arguments: Iterable[object], environment: dict[str, str]
) -> None:
    """Run WORKER in `count` processes. environment: added to the least that processes need."""
    (folder / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    least = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
        ),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*launch, f"--nproc-per-node={count}", "worker.py", *map(str, arguments)],
        cwd=folder,
        env=least | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def compare(first: Path, second: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        assert (first / name).read_text() == (second / name).read_text(), (second.name, name)
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    for name, tensor in one.items():
        # Four steps of at most 4e-4 each: a rank's part lost or doubled would show in Adam's sign.
        assert two[name].sub(tensor).abs().max() < 1e-5, (second.name, name)
        if name.endswith("correction_bias"):  # from counts of the global batch: no rounding
            assert torch.equal(two[name], tensor), (second.name, name)
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (first, second)
    ]
    assert len(logs[0]) == len(logs[1])
    for ours, theirs in zip(*logs, strict=True):
        for name in ("loss", "ce", "balance", "gradient_norm"):
            same = ours[name] is None or ours[name] == pytest.approx(theirs[name], rel=1e-4)
            assert same, (second.name, name)
