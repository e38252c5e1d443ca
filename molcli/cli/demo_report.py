"""The results of the demo: `demo.json`, and the table at its end."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from molcli.cli.demo_state import FIGURES, read_tokens
from molcli.config.sections import Recipe
from molcli.console import console, printable, say
from molcli.families.parent import Parent
from molcli.files.json_files import read_object, write_object
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import default_device, open_checkpoint, open_config
from molcli.model.parent import continue_greedily, open_teacher
from molcli.report.evaluation import model_figures, parent_figures
from molcli.report.machine import device_name, versions
from molcli.report.tables import ModelFigures, model_table
from molcli.stages.evaluate import Evaluation

PROMPT, NEW_TOKENS = "Gravity is", 16


def continuations(checkpoint: Path, parent: Parent) -> dict[str, str]:
    """Continue PROMPT greedily with the parent and the checkpoint; empty without a tokenizer."""
    tokenizer = parent.tokenizer()
    if tokenizer is None:
        return {}
    student = open_checkpoint(checkpoint, default_device())
    models: dict[str, MoLForCausalLM] = {
        "parent": open_teacher(parent, student, student.dtype),
        "trained": student,
    }
    prompt: list[int] = tokenizer(PROMPT)["input_ids"]
    return {
        name: continue_greedily(model, tokenizer, prompt, NEW_TOKENS)
        for name, model in models.items()
    }


def report(
    checkpoint: Path,
    text: Path,
    before: Evaluation,
    after: Evaluation,
    recipe: Recipe,
    seconds: dict[str, float],
    texts: dict[str, str],
) -> dict[str, Any]:
    """Collect the content of demo.json.

    Args:
        checkpoint: the trained model.
        text: the sampled text.
        before, after: evaluations before and after training, on the same held-out text.
        recipe: of the demo.
        seconds: of each stage.
        texts: continuations of PROMPT by model.

    Returns:
        ce and kl in nats per token; layers: their number (`of`), and the converted ones; tokens:
        `text` sampled, of which `calibration` fitted the blocks; `training` counts repetitions.
    """
    parent = parent_figures(before)
    assert parent is not None
    structures = open_config(checkpoint).layer_structures
    receipt = read_object(
        checkpoint / "receipt.json",
        {"calibration": (dict, type(None))},
        allowed="the receipt as the demo wrote it",
        hint="molcli demo --restart",
    )
    calibration = receipt["calibration"]
    return {
        "parent": asdict(parent),
        "upcycled": asdict(model_figures(before)),
        "trained": asdict(model_figures(after)),
        "layers": {
            "of": len(structures),
            "converted": [i for i, kind in enumerate(structures) if kind != "dense"],
        },
        "tokens": {
            "text": _count_tokens(text),
            "calibration": 0 if calibration is None else calibration["tokens"],
            "training": recipe.train.tokens,
            "heldout": after.tokens,
        },
        "continuations": texts,
        "device": device_name(default_device()),
        "versions": versions(),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
    }


def show(figures: dict[str, Any], out: Path, parent: str) -> None:
    """Print the table and the paths of outputs, then write demo.json, the last file of a demo."""
    path = out / FIGURES
    rows = {
        "parent": ModelFigures(**figures["parent"]),
        "right after upcycling": ModelFigures(**figures["upcycled"]),
        "after training": ModelFigures(**figures["trained"]),
    }
    tokens, converted = figures["tokens"], figures["layers"]["converted"]
    title = f"{tokens['heldout']:,} held-out tokens, nats a token"
    printer = console()
    printer.print(model_table(title, rows))
    printer.print(
        f"{len(converted)} of {figures['layers']['of']} layers converted "
        f"({_ranges(converted)}), fitted on {tokens['calibration']:,} tokens, trained on "
        f"{tokens['training']:,} ({tokens['training'] / tokens['text']:.1f} times the "
        f"{tokens['text']:,} of its text), in {_minutes(figures['seconds']['total'])} on "
        f"{figures['device']}.",
    )
    for name, text in figures["continuations"].items():
        words = printable(" ".join(text.split()))
        printer.print(Text.assemble("\n", (f"{name}:", "bold"), f" {words}"))
    places = {
        "checkpoint": out / "trained",
        "routing report": out / "routing.json",
        "these figures": path,
    }
    say("")
    for name, place in places.items():
        say(f"{name:<15} {place}")
    commands = (
        ["inspect", out / "trained", "--data", out / "heldout.jsonl"],
        ["train", out / "trained", out / "longer", "--data", "YOUR.txt", "--parent", parent],
        ["upcycle", parent, out / "all-layers", "--recipe", "smollm2-135m", "--data", "YOUR.txt"],
    )
    say("\nGo on with")
    for command in commands:
        say("  " + shlex.join(["molcli", *map(str, command)]))
    write_object(path, figures)


def _count_tokens(text: Path) -> int:
    return sum(length for _, length in read_tokens(text))


def _ranges(layers: list[int]) -> str:
    """[2, 3, 4, 7] -> "2–4, 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
