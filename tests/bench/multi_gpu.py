"""Compare two GPUs of one host with one: loss curves, weak scaling, resumed checkpoints.

    python tests/bench/multi_gpu.py PARENT --data train.jsonl [--converted UP] [--out lines.jsonl]
    python tests/bench/multi_gpu.py --only weak

Prints one JSON line for each result immediately, and appends it to --out. Progress is on stderr. If
a part fails, the others still run, and the exit status is 1.

curves: PARENT, converted by the recipe smollm2-135m, is trained with the same batches on one GPU,
    on two, and on one with another seed. Figures are absolute differences of the losses at each
    step.
resume: each of the first two runs is resumed from a checkpoint just after its middle, with the
    other number of GPUs. Figures are absolute differences to the uninterrupted run.
weak: tokens per second of the 1.3B-scale recipe with random weights and tokens, and the same rows
    for each GPU. `efficiency` is the rate of two GPUs over twice the rate of one. Without fla-core,
    routed blocks use softmax attention.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from processes import ROOT, Failed, Process, Processes, attempt, elapsed

RECIPE = "smollm2-135m"
WORKER = Path(__file__).with_name("weak_worker.py")


class Lines:
    """Print results with the machine that they were measured on, and append them to a file."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        # The first run starts before torch is imported here.
        self.about = ThreadPoolExecutor(1).submit(_machine)

    def add(self, kind: str, **figures: Any) -> None:
        about = self.about.result()
        line = json.dumps({"kind": kind, **figures, "after_seconds": elapsed(), **about})
        print(line, flush=True)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a") as file:
                file.write(line + "\n")


def _machine() -> dict[str, str]:
    sys.path.insert(0, str(ROOT))
    from json_lines import machine

    return machine()


class Training:
    """Train one converted model by one recipe."""

    def __init__(self, args: argparse.Namespace, converted: Path, folder: Path) -> None:
        self.args, self.converted, self.folder = args, converted, folder
        # After the middle, so that each run writes exactly one checkpoint.
        self.saved = args.steps // 2 + 1

    def start(
        self,
        processes: Processes,
        name: str,
        gpus: str,
        *,
        seed: int = 0,
        save: bool = False,
        resume: bool = False,
    ) -> Process:
        steps, count = self.args.steps, len(gpus.split(","))
        settings = {
            "tokens": steps * 64 * 512,
            "context_length": 512,
            "batch_size": 64,
            "micro_batch_size": 32,
            "checkpoint_every": self.saved if save else 0,
            "log_every": 1,
            "seed": seed,
        }
        command: list[object] = ["-m", "molcli", "train", self.converted, self.folder / name]
        command += ["--parent", self.args.parent, "--data", self.args.data, "--recipe", RECIPE]
        command += [word for k, v in settings.items() for word in ("--set", f"train.{k}={v}")]
        command += ["--gpus", count] if count > 1 else []
        return processes.start(name, gpus, command + (["--resume"] if resume else []))

    def stopped(self, name: str, of: str) -> None:
        """Make the folder that a run had right after its checkpoint. Moves the checkpoint there."""
        (self.folder / name).mkdir()
        (self.folder / of / "checkpoints").rename(self.folder / name / "checkpoints")
        rows = (self.folder / of / "log.jsonl").read_text().splitlines(keepends=True)
        (self.folder / name / "log.jsonl").write_text("".join(rows[: self.saved]))

    def log(self, name: str, key: str = "loss") -> list[float]:
        lines = (self.folder / name / "log.jsonl").read_text().splitlines()
        return [json.loads(line)[key] for line in lines]


def differences(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    errors = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return {"mean": round(sum(errors) / len(errors), 6), "largest": round(max(errors), 6)}


def convert(args: argparse.Namespace, folder: Path) -> Path:
    """Upcycle the parent, and return the checkpoint."""
    converted = folder / "converted"
    command = ["-m", "molcli", "upcycle", args.parent, converted]
    with Processes(folder, args.limit) as processes:
        command += ["--recipe", RECIPE, "--data", args.data]
        processes.start("upcycle", "0", command).finish()
    return converted


def curves(runs: Training, lines: Lines) -> None:
    """Compare loss curves. The runs "one" and "two" stay in the folder for `resume`."""
    with Processes(runs.folder, runs.args.limit) as processes:
        one = runs.start(processes, "one", "0", save=True)
        other = runs.start(processes, "other-seed", "1", seed=1)
        one.finish()
        other.finish()
        runs.start(processes, "two", "0,1", save=True).finish()
    one_gpu, two_gpus, other_seed = map(runs.log, ("one", "two", "other-seed"))
    lines.add(
        "curves",
        one_gpu=one_gpu,
        two_gpus=two_gpus,
        other_seed=other_seed,
        one_and_two=differences(one_gpu, two_gpus),
        two_seeds=differences(one_gpu, other_seed),
        tokens_per_second={
            name: round(median(runs.log(name, "tokens_per_second"))) for name in ("one", "two")
        },
    )


def resume(runs: Training, lines: Lines) -> None:
    """Resume both runs concurrently, since nothing is timed."""
    pairs = (("from-one", "one", "0,1"), ("from-two", "two", "0"))
    with Processes(runs.folder, runs.args.limit) as processes:
        resumed = []
        for name, of, gpus in pairs:
            runs.stopped(name, of)
            resumed.append(runs.start(processes, name, gpus, resume=True))
        compared = [
            attempt(compare, runs, lines, process, of, gpus)
            for process, (_, of, gpus) in zip(resumed, pairs, strict=True)
        ]
    if not all(compared):
        raise Failed("resume")


def compare(runs: Training, lines: Lines, process: Process, of: str, gpus: str) -> None:
    process.finish()
    resumed, whole = (runs.log(name)[runs.saved :] for name in (process.name, of))
    lines.add(
        "resume",
        saved_on={"one": 1, "two": 2}[of],
        resumed_on=len(gpus.split(",")),
        after_steps=runs.saved,
        losses=resumed,
        to_the_whole_run=differences(resumed, whole),
    )


def trained(args: argparse.Namespace, lines: Lines, folder: Path) -> None:
    runs = Training(args, args.converted or convert(args, folder), folder)
    curves(runs, lines)
    resume(runs, lines)


def weak(args: argparse.Namespace, lines: Lines, folder: Path) -> None:
    rates = {}
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
    for count, gpus in ((1, "0"), (2, "0,1")):
        command: list[object] = [*launch, f"--nproc-per-node={count}"] if count > 1 else []
        command += [WORKER, "--rows", args.rows, "--timed", args.timed]
        command += ["--compile", args.compile, "--sharding", args.sharding]
        with Processes(folder, args.limit) as processes:
            printed = processes.start(f"weak-{count}", gpus, command).finish().splitlines()
        figures = json.loads(next(line for line in printed if line.startswith("{")))
        rates[count] = figures["tokens_per_second"]
        lines.add("weak", gpus=count, **figures)
    lines.add("weak-efficiency", efficiency=round(rates[2] / (2 * rates[1]), 3))


def run(args: argparse.Namespace, folder: Path) -> bool:
    """Run the selected parts. Return whether all succeeded."""
    lines, done = Lines(args.out), []
    if args.only != "weak":
        done.append(attempt(trained, args, lines, folder))
    if args.only != "curves":
        done.append(attempt(weak, args, lines, folder))
    return all(done)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parent", nargs="?", help="a folder or .gguf file")
    parser.add_argument("--data", help="text to calibrate and train on")
    parser.add_argument("--converted", type=Path, help="PARENT, already upcycled, to save time")
    parser.add_argument("--steps", type=int, default=30, help="of 32,768 tokens, at least 3")
    parser.add_argument("--rows", type=int, default=8, help="of weak scaling, for each GPU a step")
    parser.add_argument("--timed", type=int, default=6, help=argparse.SUPPRESS)
    parser.add_argument("--compile", choices=["on", "off"], default="off", help="of weak scaling")
    parser.add_argument(
        "--sharding", choices=["auto", "full", "optimizer"], default="auto", help="of weak scaling"
    )
    parser.add_argument("--only", choices=["curves", "weak"])
    parser.add_argument("--limit", type=float, default=600, help="seconds for each process")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.only != "weak" and (args.parent is None or args.data is None):
        parser.error("PARENT and --data, or --only weak")
    if args.steps < 3:
        parser.error("--steps is less than 3")
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        done = run(args, Path(folder))
    sys.exit(not done)


if __name__ == "__main__":
    main()
