"""What Gated DeltaNet costs: in 0, a quarter, a half and all of the layers, with gates of ours and
random ones, right after conversion and after training.

    python tests/bench/gated_deltanet.py PARENT --recipe smollm2-135m --data wiki.jsonl \\
        --heldout heldout.jsonl --out lines.jsonl
    python tests/bench/gated_deltanet.py … --only softmax,all,all-random --train-tokens 6M

Rows, for --only: `softmax`, the parent upcycled with softmax attention; `every:4`, `every:2` and
`all`, that one converted (`molcli convert`); `direct`, upcycled to Gated DeltaNet in all layers at
once. With -random behind the name: the same checkpoint with its gates drawn as an untrained model
has them, and nothing refitted. One JSON line each: cross-entropy, its gap to the parent's, and KL
to the parent on --heldout, in nats a token; seconds are those of the step that the row is named
after. With --out, lines are appended, and what is there already is not run again.
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
from conversions import Case, Workshop
from lines import Lines, measured
from upcycle import add_common, chosen, table

from molcli.config.layer_choice import parse_choice
from molcli.config.sections import Recipe
from molcli.families.parent import open_parent
from molcli.fitting.calibration import text_hash
from molcli.stages.convert import Text, convert, open_source

RANDOM = "-random"
STEPS = ("softmax", "every:4", "every:2", "all", "direct")
ROWS = [STEPS[0], *(name for step in STEPS[1:] for name in (step, step + RANDOM))]


class Checkpoints:
    """Every checkpoint once, when it is first asked for."""

    def __init__(self, workshop: Workshop, recipe: Recipe, folder: Path) -> None:
        self.workshop, self.folder = workshop, folder
        self.softmax = replace(recipe, upcycle=replace(recipe.upcycle, gated_deltanet="none"))
        self.direct = replace(recipe, upcycle=replace(recipe.upcycle, gated_deltanet="all"))
        self.made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(self, name: str) -> tuple[Path, dict[str, Any]]:
        """And figures of its making."""
        if name not in self.made:
            out = self.folder / name.replace(":", "-")
            if name.endswith(RANDOM):
                about = self._random(name.removesuffix(RANDOM), out)
            elif name in ("softmax", "direct"):
                made, about = self.workshop.convert(getattr(self, name))
                shutil.copytree(made, out)
            else:
                about = self._converted(name, out)
            self.made[name] = out, about
        return self.made[name]

    def _converted(self, layers: str, out: Path) -> dict[str, Any]:
        source, about = self.get("softmax")
        about = {name: figure for name, figure in about.items() if name != "receipt"}
        options = replace(self.softmax.convert, gated_deltanet=parse_choice(layers))
        text = self.workshop.calibration(self.softmax)[0]
        both = Text(text.fit, text.heldout, text_hash(text.fit, text.heldout))
        recipe = replace(self.softmax, convert=options)
        _, seconds, peak = measured(lambda: convert(open_source(source), both, recipe, out))
        return about | self.workshop.size(out) | {"seconds": seconds, "peak_gb": peak}

    def _random(self, name: str, out: Path) -> dict[str, Any]:
        """Every gate projection normal, as at initialisation."""
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
    parent, lines, nothing = open_parent(args.parent), Lines(args.out), Case("", ())
    names = chosen(ROWS, args.only)
    for seed in map(int, args.seeds.split(",")):
        recipe = nothing.recipe(args.recipe, args.set, seed)
        with TemporaryDirectory(prefix="molcli-bench-", dir=args.work) as folder:
            workshop = Workshop(parent, args.data, Path(folder), args.heldout)
            checkpoints = Checkpoints(workshop, recipe, Path(folder))
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
    return about | layers | checkpoints.workshop.figures(checkpoint, checkpoints.softmax.evaluate)


def trained(
    checkpoints: Checkpoints, name: str, recipe: Recipe, args: argparse.Namespace
) -> dict[str, Any]:
    checkpoint, about = checkpoints.get(name)
    out, found = checkpoints.workshop.train(checkpoint, args.train_data or args.data, recipe)
    size = {figure: about[figure] for figure in ("total", "active", "share")}
    return size | found | checkpoints.workshop.figures(out, recipe.evaluate)


if __name__ == "__main__":
    main()
