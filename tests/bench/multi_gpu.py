"""One GPU beside two of the same host: loss curves, weak scaling, checkpoints across.

    python tests/bench/multi_gpu.py PARENT --data train.jsonl [--converted UP] [--out lines.jsonl]
    python tests/bench/multi_gpu.py --only weak

Prints one JSON line for each result, as soon as it is there, and appends it to --out. What runs is
told on stderr. Where a part fails, the others go on, and the status at the end is 1.

curves: the conversion of PARENT (recipe smollm2-135m), trained with the same batches on one GPU, on
    two, and on one with another seed: absolute differences of the losses, step by step.
resume: each of the first two runs, from a checkpoint just past its middle, gone on with the other
    number of GPUs: absolute differences to the run that was not stopped.
weak: tokens a second of the 1.3B-scale recipe, random weights and tokens, the same rows for each
    GPU. efficiency: of two GPUs, against twice one. Without fla-core its blocks use softmax.
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

from processes import ROOT, Failed, Process, Processes, attempt, passed

RECIPE = "smollm2-135m"
WORKER = Path(__file__).with_name("weak_worker.py")


class Lines:
    """Results, with what they were measured on."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        # torch is imported beside the first run, not before it.
        self.about = ThreadPoolExecutor(1).submit(_machine)

    def add(self, kind: str, **figures: Any) -> None:
        about = self.about.result()
        line = json.dumps({"kind": kind, **figures, "after_seconds": passed(), **about})
        print(line, flush=True)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a") as file:
                file.write(line + "\n")


def _machine() -> dict[str, str]:
    sys.path.insert(0, str(ROOT))
    from machine import machine

    return machine()


class Training:
    """Runs of one recipe on one converted model."""

    def __init__(self, args: argparse.Namespace, converted: Path, folder: Path) -> None:
        self.args, self.converted, self.folder = args, converted, folder
        # Past the middle: the next one would come after the end, so that each run writes one.
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
        """The folder of a run as it was after its checkpoint, which it loses."""
        (self.folder / name).mkdir()
        (self.folder / of / "checkpoints").rename(self.folder / name / "checkpoints")
        rows = (self.folder / of / "log.jsonl").read_text().splitlines(keepends=True)
        (self.folder / name / "log.jsonl").write_text("".join(rows[: self.saved]))

    def log(self, name: str, key: str = "loss") -> list[float]:
        lines = (self.folder / name / "log.jsonl").read_text().splitlines()
        return [json.loads(line)[key] for line in lines]


def difference(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    apart = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return {"mean": round(sum(apart) / len(apart), 6), "largest": round(max(apart), 6)}


def convert(args: argparse.Namespace, folder: Path) -> Path:
    """What upcycle makes of the parent."""
    converted = folder / "converted"
    command = ["-m", "molcli", "upcycle", args.parent, converted]
    with Processes(folder, args.limit) as processes:
        command += ["--recipe", RECIPE, "--data", args.data]
        processes.start("upcycle", "0", command).finish()
    return converted


def curves(runs: Training, lines: Lines) -> None:
    """Leaves the runs "one" and "two"."""
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
        one_and_two=difference(one_gpu, two_gpus),
        two_seeds=difference(one_gpu, other_seed),
        tokens_per_second={
            name: round(median(runs.log(name, "tokens_per_second"))) for name in ("one", "two")
        },
    )


def resume(runs: Training, lines: Lines) -> None:
    """Both at once: nothing is timed."""
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
        to_the_whole_run=difference(resumed, whole),
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
    """Whether all went well."""
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
    parser.add_argument("--converted", type=Path, help="what upcycle made of PARENT, to save time")
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
