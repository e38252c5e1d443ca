"""The commands that write, what each reads and writes, and what may differ between two runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.kills.world import SETTINGS

SETS = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
DATA = ["--data", "{world}/corpus.jsonl"]
STAGES = "train.stages=[{{kind: align, tokens: 512}}, {{kind: distill, tokens: 512}}]"
PARENT = ["--parent", "{world}/parent"]


@dataclass(frozen=True)
class Command:
    """A command of the campaign.

    Attributes:
        argv: its words; {world} is the folder of inputs, and the working folder that of outputs.
        out: what it writes, in the working folder; None where all goes to the cache.
        done: what comes last, where `out` grows and an unfinished one is continued; None where
            `out` appears at once.
        whole: patterns of what appears at once, in the working folder; by default `out`.
        before: names in the working folder, and what of the world is copied there first.
        replaced: names of the working folder, whose content may be the old or the new one.
        removed: patterns of what comes and goes while the command runs.
        kept: patterns of what an interrupted run may leave for the next one.
        sets: if the command takes the settings of the world.
        measured: fields that are so, besides `VOLATILE`.
    """

    argv: Sequence[str]
    out: str = "out"
    done: str | None = None
    whole: tuple[str, ...] = ("out",)
    before: dict[str, str] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    sets: bool = True
    measured: frozenset[str] = frozenset()

    def words(self, world: str) -> list[str]:
        """As they are typed."""
        return [word.format(world=world) for word in (*self.argv, *(SETS if self.sets else ()))]


_TRAINING: dict[str, Any] = dict(
    done="out/config.json",
    whole=("out/*.json", "out/*.safetensors", "out/*.yaml"),
    replaced=("out/log.jsonl", "out/train.html"),
    removed=("out/checkpoints/step-????????", "out/checkpoints/step-????????/*"),
    measured=frozenset({"progress.json"}),  # its sum: it holds seconds
)
_CALIBRATION: dict[str, Any] = dict(kept=(".out.unfinished*",))
_FIGURES: dict[str, Any] = dict(
    out="out.json", whole=("out.json",), before={"out.json": "old.json"}, replaced=("out.json",)
)
COMMANDS: dict[str, Command] = {
    "calibrate": Command(["calibrate", "{world}/parent", "out", *DATA], **_CALIBRATION),
    "calibrate, sampled": Command(["calibrate", "{world}/parent", "out"], **_CALIBRATION),
    "calibrate, GGUF": Command(["calibrate", "{world}/parent.gguf", "out", *DATA], **_CALIBRATION),
    "upcycle": Command(["upcycle", "{world}/parent", "out", "--calibration", "{world}/calibrated"]),
    "upcycle, empty folder": Command(
        ["upcycle", "{world}/parent", "out", "--calibration", "{world}/calibrated"],
        before={"out": "empty"},
    ),
    "upcycle, with text": Command(["upcycle", "{world}/parent", "out", *DATA]),
    "upcycle, sampled": Command(["upcycle", "{world}/parent", "out"]),
    "convert": Command(["convert", "{world}/mol", "out", "--gated-deltanet", "all", *DATA]),
    "convert, sampled": Command(
        [
            *["convert", "{world}/mol", "out", "--gated-deltanet", "all", *PARENT],
            *["--set", "calibrate.data=null"],
        ]
    ),
    "init": Command(["init", "paper-80m-1+2of5", "out"]),
    "train": Command(["train", "{world}/mol", "out", *PARENT, *DATA], **_TRAINING),
    "train --resume": Command(
        ["train", "{world}/mol", "out", *PARENT, *DATA, "--resume"],
        before={"out": "stopped"},
        **_TRAINING,
    ),
    "train --logits": Command(
        ["train", "{world}/mol", "out", "--logits", "{world}/logits"], **_TRAINING
    ),
    "train, stages": Command(
        [*["train", "{world}/mol", "out", *PARENT, *DATA], "--set", STAGES], **_TRAINING
    ),
    "data tokenize": Command(
        ["data", "tokenize", "{world}/corpus.txt", "out", "-t", "{world}/parent"], sets=False
    ),
    "data sample": Command(
        ["data", "sample", "{world}/parent", "out.jsonl"], out="out.jsonl", whole=("out.jsonl",)
    ),
    "data cache-logits": Command(
        ["data", "cache-logits", "{world}/parent", "out", *DATA, "--top-k", "5"],
        done="out/logits-00005.safetensors",
        whole=("out/*",),
    ),
    "eval --json": Command(
        ["eval", "{world}/mol", *DATA, *PARENT, "--json", "out.json"], **_FIGURES
    ),
    "inspect --json": Command(["inspect", "{world}/mol", *DATA, "--json", "out.json"], **_FIGURES),
    "plan --json": Command(
        ["plan", "{world}/parent", "--json", "out.json"], sets=False, **_FIGURES
    ),
    "bench --json": Command(
        ["bench", "{world}/mol", "--only", "prefill", "--no-compile", "--json", "out.json"],
        sets=False,
        measured=frozenset({"mol", "peer", "ratio"}),
        **(_FIGURES | {"done": "out.json", "whole": ()}),  # it grows with each row
    ),
    "demo": Command(
        ["demo", *PARENT, "--out", "out", "--set", "upcycle.layers=[1]"],
        done="out/demo.json",
        whole=("out/upcycled", "out/demo.json", "out/routing.json"),
        replaced=("out/demo-state.json",),
        removed=("out/drawn.jsonl", "out/trained/checkpoints*"),
        measured=frozenset({"progress.json", "sum"}),  # over seconds, too
    ),
}

# Made while the world is: name of the output -> command.
PREPARED: dict[str, list[str]] = {
    "calibrated": ["calibrate", "parent", "calibrated", "--data", "corpus.jsonl"],
    "mol": ["upcycle", "parent", "mol", "--calibration", "calibrated"],
    "logits": ["data", "cache-logits", "parent", "logits", "--data", "corpus.jsonl"],
    "stopped": ["train", "mol", "stopped", "--parent", "parent", "--data", "corpus.jsonl"],
}


# What is measured, and so differs between two runs: names of fields, in all JSON files and lines.
VOLATILE = frozenset({"seconds", "tokens_per_second"})
# Pages that show it: their numbers are not compared, or, where curves of it are drawn, nothing but
# that the page is whole.
NUMBERS_VARY, CURVES_VARY = "receipt.html", "train.html"
