"""A matrix of conversions: initialisations and settings, by seed, after 0 or more training tokens.

    python tests/bench/upcycle.py PARENT --data train.jsonl --heldout heldout.jsonl \\
        --seeds 0,1,2 --set calibrate.tokens=196608 \\
        --case fitted: --case wide:d_thin=256,num_heads_thin=3 --case svd:method=svd \\
        --train-tokens 6M --out lines.jsonl

One JSON line per conversion, a markdown table at the end: means over seeds, and half the range
between them. `gap` is the cross-entropy above the parent's, in nats a token: on the rows that
calibration held out, and through `molcli eval` on a file that nothing was fitted to or chosen by.
With --out, lines are appended, and what is there already is not run again.
"""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from conversions import Case, Lines, Workshop, attempt, measured
from machine import machine

from molcli.cli.plan import parse_count
from molcli.config.sections import Recipe
from molcli.io.parent import open_parent
from molcli.maths.parameters import count_parameters
from molcli.model.configuration_mol import MoLConfig
from molcli.model.costs import parent_of
from molcli.stages.evaluate import evaluate
from molcli.stages.train import train

DEFAULT = ["fitted:", "pca:method=pca", "svd:method=svd", "random:method=random"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parent")
    parser.add_argument("--data", required=True, help="text to calibrate and train on")
    parser.add_argument("--heldout", help="text that nothing else sees")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--recipe", help="of all cases")
    parser.add_argument("--set", action="append", default=[], help="of all cases")
    parser.add_argument("--case", action="append", help=f"name:key=value,...; default: {DEFAULT}")
    parser.add_argument("--train-tokens", type=parse_count, default=0)
    parser.add_argument("--train-data", help="else --data")
    parser.add_argument("--out", type=Path, help="a file for the lines")
    parser.add_argument("--work", type=Path, help="where the scratch folder is made")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    lines = Lines(args.out)
    known, rows = lines.known(), []
    cases = [Case.parse(text) for text in args.case or DEFAULT]
    seeds = [int(seed) for seed in args.seeds.split(",")]
    # A slip in any case shows before hours of the others.
    runs = [
        (case, seed, case.recipe(args.recipe, args.set, seed)) for seed in seeds for case in cases
    ]
    with TemporaryDirectory(prefix="molcli-bench-", dir=args.work) as folder:
        workshop = Workshop(open_parent(args.parent), args.data, Path(folder))
        for case, seed, recipe in runs:
            key = {
                "parent": args.parent,
                "case": case.name,
                "seed": seed,
                "settings": [*args.set, *case.overrides],
                "train_tokens": args.train_tokens,
            }
            if done := [row for row in known if key.items() <= row.items()]:
                rows.append(done[0])
                continue
            found = attempt(lambda recipe=recipe: figures(workshop, recipe, args))
            row = key | found | {"command": " ".join(sys.argv)} | machine()
            lines.add(row)
            rows.append(row)
    print(table([row for row in rows if "error" not in row]))


def figures(workshop: Workshop, recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """Of one conversion, and of the training behind it."""
    checkpoint, found = workshop.convert(recipe)
    config = MoLConfig.from_pretrained(checkpoint)
    count, parent = count_parameters(config), count_parameters(parent_of(config))
    found["share"] = round((count.active - count.embedding) / parent.non_embedding, 4)
    found["heldout"] = heldout(workshop, checkpoint, recipe, args.heldout)
    if not args.train_tokens:
        return found
    out = workshop.folder / "trained"
    shutil.rmtree(out, ignore_errors=True)
    settings = replace(recipe.train, tokens=args.train_tokens, checkpoint_every=0)
    training, data = replace(recipe, train=settings), args.train_data or args.data
    result, seconds, peak = measured(
        lambda: train(checkpoint, out, data, training, workshop.parent)
    )
    found["trained"] = {
        "tokens": result.tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(result.tokens_per_second),
        "peak_gb": peak,
        "heldout": heldout(workshop, out, recipe, args.heldout),
    }
    return found


def heldout(
    workshop: Workshop, checkpoint: Path, recipe: Recipe, data: str | None
) -> dict[str, Any] | None:
    if data is None:
        return None
    found = evaluate(checkpoint, workshop.parent, data, recipe.evaluate)
    assert found.parent_ce is not None
    names = "tokens", "ce", "parent_ce", "kl", "agreement"
    return {"gap": found.ce - found.parent_ce} | {n: getattr(found, n) for n in names}


def table(rows: list[dict[str, Any]]) -> str:
    """A line per case."""
    heads = ["case", "seeds", "share", "gap", "KL", "held-out gap", "trained gap", "s", "GB"]
    lines = [heads, ["---"] * len(heads)]
    for name in dict.fromkeys(str(row["case"]) for row in rows):
        own = [row for row in rows if row["case"] == name]
        later = [(row.get("trained") or {}).get("heldout") for row in own]
        lines.append(
            [
                name,
                str(len(own)),
                f"{own[0]['share']:.1%}",
                spread([row["gap"] for row in own]),
                spread([row["kl"] for row in own]),
                spread([row["heldout"]["gap"] for row in own if row["heldout"]]),
                spread([figures["gap"] for figures in later if figures]),
                spread([row["seconds"] for row in own], digits=0),
                spread([row["peak_gb"] for row in own if row["peak_gb"] is not None], digits=1),
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(values: list[float], digits: int = 3) -> str:
    """Mean, and half the range where there is one."""
    if not values:
        return "–"
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
