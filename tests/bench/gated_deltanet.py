"""Measure the loss from Gated DeltaNet in 0, a quarter, a half and all of the layers.

Gates are fitted or random; figures are from right after conversion and from after training.

    python tests/bench/gated_deltanet.py PARENT --recipe smollm2-135m --data wiki.jsonl \\
        --heldout heldout.jsonl --out lines.jsonl
    python tests/bench/gated_deltanet.py … --only softmax,all,all-random --train-tokens 6M

Rows, for --only: `softmax` is the parent upcycled with softmax attention. `every:4`, `every:2` and
`all` are that checkpoint after `molcli convert`. `direct` is the parent upcycled to Gated DeltaNet
in all layers. The suffix -random means the same checkpoint with gates drawn as in an untrained
model, without any refit. Each row is one JSON line: cross-entropy, its gap to the parent's, and KL
to the parent on --heldout, in nats a token. `seconds` is the time of the step that the row is named
after. With --out, lines are appended to a file, and rows that it already has are not run again.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from conversions import Case, ConversionRunner
from json_lines import JsonLines, measured
from table import table
from upcycle import add_common, chosen, parse_heldout, parse_sources

from molcli.config.layer_choice import parse_choice
from molcli.config.sections import Recipe
from molcli.families.parent import open_parent
from molcli.fitting.calibration import text_hash
from molcli.stages.convert import ConversionText, convert, open_source_checkpoint

RANDOM = "-random"
STEPS = ("softmax", "every:4", "every:2", "all", "direct")
ROWS = [STEPS[0], *(name for step in STEPS[1:] for name in (step, step + RANDOM))]


class Checkpoints:
    """Make each checkpoint at its first use and keep it."""

    def __init__(self, runner: ConversionRunner, recipe: Recipe, folder: Path) -> None:
        self.runner, self.folder = runner, folder
        self.softmax = replace(recipe, upcycle=replace(recipe.upcycle, gated_deltanet="none"))
        self.direct = replace(recipe, upcycle=replace(recipe.upcycle, gated_deltanet="all"))
        self.made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(self, name: str) -> tuple[Path, dict[str, Any]]:
        """Return the checkpoint's folder, and figures of how it was made."""
        if name not in self.made:
            out = self.folder / name.replace(":", "-")
            if name.endswith(RANDOM):
                about = self._random(name.removesuffix(RANDOM), out)
            elif name in ("softmax", "direct"):
                made, about = self.runner.convert(getattr(self, name))
                shutil.copytree(made, out)
            else:
                about = self._converted(name, out)
            self.made[name] = out, about
        return self.made[name]

    def _converted(self, layers: str, out: Path) -> dict[str, Any]:
        source, about = self.get("softmax")
        about = {name: figure for name, figure in about.items() if name != "receipt"}
        options = replace(self.softmax.convert, gated_deltanet=parse_choice(layers))
        text = self.runner.calibration(self.softmax)[0]
        both = ConversionText(text.fit, text.heldout, text_hash(text.fit, text.heldout))
        recipe = replace(self.softmax, convert=options)
        _, seconds, peak = measured(
            lambda: convert(open_source_checkpoint(source), both, recipe, out)
        )
        return about | self.runner.size(out) | {"seconds": seconds, "peak_gb": peak}

    def _random(self, name: str, out: Path) -> dict[str, Any]:
        """Draw every gate projection from the normal distribution of an untrained model."""
        checkpoint, about = self.get(name)
        std = json.loads((checkpoint / "config.json").read_text())["initializer_range"]
        generator = torch.Generator().manual_seed(self.softmax.calibrate.seed)
        shutil.copytree(checkpoint, out)
        for file in sorted(out.glob("*.safetensors")):
            tensors = load_file(file)
            for gate in sorted(key for key in tensors if key.endswith("mixer.g_proj")):
                drawn = torch.randn(tensors[gate].shape, generator=generator) * std
                tensors[gate] = drawn.to(tensors[gate].dtype)
            save_file(tensors, file, metadata={"format": "pt"})
        return about


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser)
    args = parser.parse_args(words)
    parent, lines = open_parent(args.parent), JsonLines(args.out)
    names = chosen(ROWS, args.only)
    for seed in map(int, args.seeds.split(",")):
        recipe = Case("", ()).recipe(args.recipe, args.set, seed)
        with TemporaryDirectory(prefix="molcli-bench-", dir=args.work) as folder:
            runner = ConversionRunner(
                parent, parse_sources(args.data), Path(folder), parse_heldout(args.heldout)
            )
            checkpoints = Checkpoints(runner, recipe, Path(folder))
            for name in names:
                settings = [f"recipe={args.recipe}", *args.set]
                key = {"parent": args.parent, "case": name, "seed": seed, "settings": settings}
                lines.row(key | {"train_tokens": 0}, partial(figures, checkpoints, name))
                if args.train_tokens:
                    section = replace(recipe.train, tokens=args.train_tokens)
                    train = partial(trained, checkpoints, name, replace(recipe, train=section))
                    rates = f"{section.learning_rate:g}/{section.new_learning_rate:g}"
                    about = {"train_tokens": args.train_tokens, "rates": rates}
                    lines.row(key | about, partial(train, args))
    print(table(lines.rows))


def figures(checkpoints: Checkpoints, name: str) -> dict[str, Any]:
    checkpoint, about = checkpoints.get(name)
    config = json.loads((checkpoint / "config.json").read_text())
    layers = {
        "gated_deltanet_layers": config["layer_mixers"].count("gated_deltanet"),
        "converted_layers": config["layer_structures"].count("mixture"),
    }
    return about | layers | checkpoints.runner.figures(checkpoint, checkpoints.softmax.evaluate)


def trained(
    checkpoints: Checkpoints, name: str, recipe: Recipe, args: argparse.Namespace
) -> dict[str, Any]:
    checkpoint, about = checkpoints.get(name)
    out, found = checkpoints.runner.train(
        checkpoint, parse_sources(args.train_data or args.data), recipe
    )
    size = {figure: about[figure] for figure in ("total", "active", "share")}
    return size | found | checkpoints.runner.figures(out, recipe.evaluate)


if __name__ == "__main__":
    main()
