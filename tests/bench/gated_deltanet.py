"""What Gated DeltaNet costs before any training: 0, a quarter, a half and all of the layers.

    python tests/bench/gated_deltanet.py PARENT --data train.jsonl [--heldout heldout.jsonl]

Upcycles the parent with softmax attention, converts it (`molcli convert`), and prints one JSON line
per model: cross-entropy and KL to the parent on held-out text, in nats a token. layers: how they
were chosen. gate: "ours", or "random": the same checkpoint with its gates drawn as an untrained
model has them, and nothing refitted. how: "convert" of the softmax model, or "upcycle" straight to
Gated DeltaNet. `--set` reaches every stage.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine

from molcli.cli.calibrate import run_calibrate
from molcli.cli.convert import run_convert
from molcli.cli.upcycle import run_upcycle
from molcli.config.layer_choice import parse_choice
from molcli.config.recipe import load_recipe
from molcli.config.sections import Recipe
from molcli.io.parent import open_parent
from molcli.stages.evaluate import evaluate

CHOICES = ["every:4", "every:2", "all"]


def with_random_gates(checkpoint: Path, out: Path, std: float, seed: int) -> Path:
    """The checkpoint with every gate projection normal, as at initialisation."""
    generator = torch.Generator().manual_seed(seed)
    out.mkdir()
    for file in sorted(checkpoint.iterdir()):
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        for name, tensor in sorted(tensors.items()):
            if name.endswith("mixer.g_proj"):
                drawn = torch.randn(tensor.shape, generator=generator) * std
                tensors[name] = drawn.to(tensor.dtype)
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parent")
    parser.add_argument("--data", required=True, help="text to fit on")
    parser.add_argument("--heldout", help="text to measure on; else what calibration held out")
    parser.add_argument("--recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--auto", action="store_true", help="the chosen layers by measured KL, too")
    parser.add_argument("--random-seeds", type=int, default=1)
    args = parser.parse_args()

    parent = open_parent(args.parent)
    recipe = load_recipe(args.recipe, args.overrides)
    recipe = replace(recipe, calibrate=replace(recipe.calibrate, data=args.data))
    recipe = replace(recipe, upcycle=replace(recipe.upcycle, gated_deltanet="none"))
    with TemporaryDirectory(dir=".") as folder:
        work = Path(folder)
        calibration, softmax = work / "calibration", work / "softmax"
        run_calibrate(parent, recipe, calibration)
        heldout = args.heldout
        if heldout is None:
            heldout = str(work / "heldout.jsonl")
            write_rows(calibration, Path(heldout))

        def show(checkpoint: Path, layers: str, how: str, gate: str, seconds: float) -> None:
            found = evaluate(checkpoint, parent, heldout, recipe.evaluate)
            kinds = json.loads((checkpoint / "config.json").read_text())["layer_kinds"]
            print(
                json.dumps(
                    {
                        "layers": layers,
                        "converted": sum("gated_deltanet" in kind for kind in kinds),
                        "of": sum(kind != "dense" for kind in kinds),
                        "how": how,
                        "gate": gate,
                        "ce": round(found.ce, 4),
                        "kl": None if found.kl is None else round(found.kl, 4),
                        "parent_ce": None if found.parent_ce is None else round(found.parent_ce, 4),
                        "tokens": found.tokens,
                        "seconds": round(seconds, 1),
                    }
                ),
                flush=True,
            )

        def show_random(checkpoint: Path, layers: str, how: str) -> None:
            std = json.loads((checkpoint / "config.json").read_text())["initializer_range"]
            for seed in range(args.random_seeds):
                drawn = checkpoint.with_name(f"{checkpoint.name}-random-{seed}")
                show(with_random_gates(checkpoint, drawn, std, seed), layers, how, "random", 0.0)

        print(json.dumps({"command": "python " + " ".join(sys.argv), **machine()}), flush=True)
        start = time.perf_counter()
        run_upcycle(parent, recipe, softmax, calibration=calibration)
        show(softmax, "none", "upcycle", "-", time.perf_counter() - start)
        for name, chosen in choices(recipe, auto=args.auto).items():
            out = work / name.replace(":", "-").replace(" ", "-")
            start = time.perf_counter()
            run_convert(softmax, chosen, out, calibration=calibration)
            show(out, name, "convert", "ours", time.perf_counter() - start)
            show_random(out, name, "convert")
        start = time.perf_counter()
        direct = replace(recipe, upcycle=replace(recipe.upcycle, gated_deltanet="all"))
        run_upcycle(parent, direct, work / "direct", calibration=calibration)
        show(work / "direct", "all", "upcycle", "ours", time.perf_counter() - start)
        show_random(work / "direct", "all", "upcycle")


def choices(recipe: Recipe, *, auto: bool) -> dict[str, Recipe]:
    """A quarter, a half and all of the layers; auto: a quarter and a half by measured KL, too."""
    found = {text: replace(recipe.convert, gated_deltanet=parse_choice(text)) for text in CHOICES}
    for budget in (0.25, 0.5) if auto else ():
        chosen = replace(recipe.convert, gated_deltanet="auto", budget=budget)
        found[f"auto {budget}"] = chosen
    return {name: replace(recipe, convert=section) for name, section in found.items()}


def write_rows(calibration: Path, out: Path) -> None:
    """The calibration's held-out rows, document by document."""
    tokens = load_file(calibration / "tokens.safetensors")
    rows = zip(tokens["heldout.input_ids"], tokens["heldout.document_ids"], strict=True)
    lines = [
        json.dumps({"input_ids": ids[documents == number].tolist()})
        for ids, documents in rows
        for number in documents.unique()
    ]
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
