"""One GPU beside two of the same host: loss curves, weak scaling, checkpoints across.

    python tests/bench/multi_gpu.py PARENT --data train.jsonl [--converted UP] [--out lines.jsonl]
    python tests/bench/multi_gpu.py --only weak

Prints one JSON line for each result, as soon as it is there, and appends it to --out.

curves: the conversion of PARENT (recipe smollm2-135m), trained with the same batches on one GPU, on
    two, and on one with another seed: absolute differences of the losses, step by step.
resume: each of the first two runs, from its checkpoint halfway, gone on with the other number of
    GPUs: absolute differences to the run that was not stopped.
weak: tokens a second of the 1.3B-scale recipe, random weights and tokens, the same rows for each
    GPU. efficiency: of two GPUs, against twice one. Without fla-core its blocks use softmax.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine

RECIPE = "smollm2-135m"
ROOT = Path(__file__).parents[2]


class Lines:
    """Results, with what they were measured on."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.about = out, machine()
        self.start = time.perf_counter()

    def add(self, kind: str, **figures: Any) -> None:
        passed = round(time.perf_counter() - self.start)
        line = json.dumps({"kind": kind, **figures, "after_seconds": passed, **self.about})
        print(line, flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(line + "\n")


def start(command: Sequence[object], gpus: str) -> subprocess.Popen[str]:
    """Of this Python, on these GPUs."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*running: subprocess.Popen[str]) -> list[str]:
    """What they printed. Ends the benchmark if one of them failed."""
    printed = [process.communicate()[0] for process in running]
    for process, text in zip(running, printed, strict=True):
        if process.returncode:
            sys.exit(f"{process.args}\n{text[-4000:]}")
    return printed


class Training:
    """Runs of one recipe on one converted model."""

    def __init__(self, args: argparse.Namespace, converted: Path, folder: Path) -> None:
        self.args, self.converted, self.folder = args, converted, folder

    def start(
        self, name: str, gpus: str, seed: int = 0, *, resume: bool = False
    ) -> subprocess.Popen[str]:
        steps, count = self.args.steps, len(gpus.split(","))
        settings = {
            "tokens": steps * 64 * 512,
            "context_length": 512,
            "batch_size": 64,
            "micro_batch_size": 32,
            "checkpoint_every": steps // 2,
            "log_every": 1,
            "seed": seed,
        }
        command: list[object] = ["-m", "molcli", "train", self.converted, self.folder / name]
        command += ["--parent", self.args.parent, "--data", self.args.data, "--recipe", RECIPE]
        command += [word for k, v in settings.items() for word in ("--set", f"train.{k}={v}")]
        command += ["--gpus", count] if count > 1 else []
        return start(command + (["--resume"] if resume else []), gpus)

    def halfway(self, name: str, of: str) -> None:
        """The folder of a run as it was when its first half was done."""
        checkpoint = f"checkpoints/step-{self.args.steps // 2:08d}"
        shutil.copytree(self.folder / of / checkpoint, self.folder / name / checkpoint)
        shutil.copy(self.folder / of / "log.jsonl", self.folder / name)

    def log(self, name: str, key: str = "loss") -> list[float]:
        lines = (self.folder / name / "log.jsonl").read_text().splitlines()
        return [json.loads(line)[key] for line in lines]


def difference(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    apart = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return {"mean": round(sum(apart) / len(apart), 6), "largest": round(max(apart), 6)}


def curves_and_resume(args: argparse.Namespace, lines: Lines, folder: Path) -> None:
    converted = args.converted
    if converted is None:
        converted = folder / "converted"
        command = ["-m", "molcli", "upcycle", args.parent, converted]
        finish(start([*command, "--recipe", RECIPE, "--data", args.data], "0"))
    runs = Training(args, converted, folder)
    finish(runs.start("one", "0"), runs.start("other-seed", "1", seed=1))
    finish(runs.start("two", "0,1"))
    one, two = runs.log("one"), runs.log("two")
    lines.add(
        "curves",
        one_gpu=one,
        two_gpus=two,
        other_seed=runs.log("other-seed"),
        one_and_two=difference(one, two),
        two_seeds=difference(one, runs.log("other-seed")),
        tokens_per_second={
            name: round(runs.log(name, "tokens_per_second")[-2]) for name in ("one", "two")
        },
    )
    for name, of, gpus in (("from-one", "one", "0,1"), ("from-two", "two", "0")):
        runs.halfway(name, of)
        finish(runs.start(name, gpus, resume=True))
        resumed, whole = runs.log(name), runs.log(of)
        half = args.steps // 2
        lines.add(
            "resume",
            saved_on={"one": 1, "two": 2}[of],
            resumed_on=len(gpus.split(",")),
            losses=resumed[half:],
            to_the_whole_run=difference(resumed[half:], whole[half:]),
        )


def weak(args: argparse.Namespace, lines: Lines) -> None:
    rates = {}
    for count, gpus in ((1, "0"), (2, "0,1")):
        launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
        command = [
            *launch,
            f"--nproc-per-node={count}",
            __file__,
            "--worker",
            "--rows",
            args.rows,
            "--compile",
            args.compile,
        ]
        printed = finish(start(command, gpus))[0].splitlines()
        figures = json.loads(next(line for line in printed if line.startswith("{")))
        rates[count] = figures["tokens_per_second"]
        lines.add("weak", gpus=count, **figures)
    lines.add("weak-efficiency", efficiency=round(rates[2] / (2 * rates[1]), 3))


def worker(args: argparse.Namespace) -> None:
    """One process of `weak`: the main one prints a line."""
    from molcli.config.recipe import load_recipe
    from molcli.io.packing import pack
    from molcli.model import MoLForCausalLM
    from molcli.model.compiled import compile_layers
    from molcli.stages.init import untrained_config
    from molcli.stages.train.objective import Objective, Weights
    from molcli.stages.train.optimizer import make_optimizer
    from molcli.stages.train.ranks import make_student, open_ranks
    from molcli.stages.train.state import TrainState
    from molcli.stages.train.steps import clip

    kind = "gated_deltanet" if find_spec("fla") else "softmax"
    recipe = load_recipe("paper-1.3b-1+3of15", [f"model.layer_kind={kind}"])
    accelerator, compiled = open_ranks(recipe.train, Path("unused")), args.compile == "on"
    torch.manual_seed(0)
    with accelerator.device:
        model = MoLForCausalLM(untrained_config(recipe.model)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    student = make_student(model, torch.bfloat16, accelerator)
    if compiled:
        compile_layers(model)
    optimizer = make_optimizer(model, recipe.train)
    state = TrainState(model, optimizer)
    objective = Objective(student, None, Weights(ce=1.0, kl=0.0, compiled=compiled), 0.0)
    length, count = recipe.train.context_length, args.rows * accelerator.num_processes
    documents = torch.randint(recipe.model.vocab_size, (2 * count * length,), dtype=torch.int32)
    rows = pack(list(documents.split(length // 2)), length, seed=0)
    micro = min(args.rows, recipe.train.micro_batch_size)

    def step(number: int) -> None:
        index = torch.arange(count) + (number % 2) * count
        objective.backward(rows, index, micro, accelerator)
        clip(state, 1.0, accelerator)
        optimizer.step()
        student.loads.update(1e-3, accelerator)
        optimizer.zero_grad()

    for number in range(3):
        step(number)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    accelerator.wait_for_everyone()
    begin = time.perf_counter()
    for number in range(args.timed):
        step(number)
    torch.cuda.synchronize()
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - begin
    if accelerator.is_main_process:
        figures = {
            "tokens_per_second": round(args.timed * count * length / seconds),
            "layer_kind": kind,
            "compiled": compiled,
            "parameters": sum(p.numel() for p in model.parameters()),
            "rows_a_gpu": args.rows,
            "context_length": length,
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        }
        print(json.dumps(figures), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parent", nargs="?", help="a folder or .gguf file")
    parser.add_argument("--data", help="text to calibrate and train on")
    parser.add_argument("--converted", type=Path, help="what upcycle made of PARENT, to save time")
    parser.add_argument("--steps", type=int, default=30, help="of 32,768 tokens, an even number")
    parser.add_argument("--rows", type=int, default=8, help="of weak scaling, for each GPU a step")
    parser.add_argument("--timed", type=int, default=6, help=argparse.SUPPRESS)
    parser.add_argument("--compile", choices=["on", "off"], default="off", help="of weak scaling")
    parser.add_argument("--only", choices=["curves", "weak"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    if args.only != "weak" and (args.parent is None or args.data is None):
        parser.error("PARENT and --data, or --only weak")
    lines = Lines(args.out)
    if args.only != "weak":
        with TemporaryDirectory() as folder:
            curves_and_resume(args, lines, Path(folder))
    if args.only != "curves":
        weak(args, lines)


if __name__ == "__main__":
    main()
