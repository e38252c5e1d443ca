"""Measure conversions and baselines for several seeds, after conversion and after training.

    python tests/bench/upcycle.py PARENT --recipe smollm2-135m --data wiki.jsonl \\
        --heldout heldout.jsonl --seeds 0,1,2 --out lines.jsonl
    python tests/bench/upcycle.py … --only fitted,svd,random --train-tokens 6M \\
        --train-data train.jsonl --learning-rate svd=1e-3/1e-4 --learning-rate random=1e-3/1e-3,3e-3

Without --case, the cases are: `fitted`, the recipe's shape in all layers; `75%`, a shape with 75%
of the parameters active; `upper-half`, `every-other`, `middle` and `auto`, half of the layers,
where `auto` selects those that cost least alone; and the baselines `pca`, `svd`, `random`,
`skipped` and `depth_pruned` (tests/bench/pruned.py).

Prints one JSON line per conversion and per training, and at the end a markdown table with means
over seeds and half of their range. gap: cross-entropy minus the parent's on --heldout, in nats a
token, as in `molcli eval`. receipt: figures on the rows that calibration held out. With --out,
lines are appended to a file, and rows that it already has are not run again.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from conversions import Case, ConversionRunner
from json_lines import JsonLines

from molcli.cli.plan import parse_count
from molcli.config.sections import Recipe
from molcli.families.parent import open_parent

BASELINES = "pca", "svd", "random", "skipped", "depth_pruned"


def default_cases(layers: int) -> list[Case]:
    """Return the cases for a parent with so many layers."""
    texts = [
        "fitted:",
        "75%:preset=quality",
        f"upper-half:layers={list(range(layers // 2, layers))}",
        f"every-other:layers={list(range(1, layers, 2))}",
        "middle:layers=middle",
        "auto:layers=auto",
        *(f"{method}:method={method}" for method in BASELINES),
    ]
    return [Case.parse(text) for text in texts]


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that this benchmark shares with the one of Gated DeltaNet."""
    parser.add_argument("parent")
    parser.add_argument("--data", required=True, help="text to calibrate on, and train on")
    parser.add_argument("--heldout", required=True, help="text for evaluation only")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", help="names of cases, a,b")
    parser.add_argument("--recipe", help="of all cases")
    parser.add_argument("--set", action="append", default=[], help="of all cases")
    parser.add_argument("--train-tokens", type=parse_count, default=0)
    parser.add_argument("--train-data", help="where a case has no train.data, else --data")
    parser.add_argument("--out", type=Path, help="a file for the lines")
    parser.add_argument("--work", type=Path, help="where the scratch folder is made")


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser)
    parser.add_argument("--case", action="append", help="name:key=value,... in place of the above")
    parser.add_argument(
        "--learning-rate",
        action="append",
        default=[],
        metavar="CASE=RATE[/NEW],...",
        help="to train this case with, one after another, else the recipe's; NEW: of what is new",
    )
    return parser.parse_args(words)


def chosen(names: list[str], only: str | None) -> list[str]:
    """Return the names that --only selects, in the order of `names`. Exits on an unknown name."""
    wanted = names if only is None else only.split(",")
    if unknown := sorted(set(wanted) - set(names)):
        sys.exit(f"no case {', '.join(unknown)}; there are {', '.join(names)}")
    return [name for name in names if name in wanted]


def training(recipe: Recipe, case: str, rates: list[str], tokens: int) -> list[Recipe]:
    """Return a recipe for each learning rate of the case; without any, the recipe's own."""
    base = replace(recipe.train, tokens=tokens)
    given = dict(text.partition("=")[::2] for text in rates).get(case)
    settings = [base] if given is None else []
    for text in given.split(",") if given else ():
        inherited, _, new = text.partition("/")
        rate = replace(base, learning_rate=float(inherited))
        settings.append(replace(rate, new_learning_rate=float(new)) if new else rate)
    return [replace(recipe, train=one) for one in settings]


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    parent, lines = open_parent(args.parent), JsonLines(args.out)
    cases = default_cases(parent.config.num_hidden_layers)
    if args.case:
        cases = [Case.parse(text) for text in args.case]
    names = [case.name for case in cases]
    wanted, seeds = chosen(names, args.only), [int(seed) for seed in args.seeds.split(",")]
    chosen(names, ",".join(text.partition("=")[0] for text in args.learning_rate) or None)
    # Load all recipes first: an error in one shows before hours of work on the others.
    runs = [
        (c, seed, c.recipe(args.recipe, args.set, seed))
        for seed in seeds
        for c in cases
        if c.name in wanted
    ]
    with TemporaryDirectory(prefix="molcli-bench-", dir=args.work) as folder:
        runner = ConversionRunner(parent, args.data, Path(folder), args.heldout)
        for case, seed, recipe in runs:
            settings = [f"recipe={args.recipe}", *args.set, *case.overrides]
            key = {"parent": args.parent, "case": case.name, "seed": seed, "settings": settings}

            def converted(case: Case = case, recipe: Recipe = recipe) -> dict[str, Any]:
                checkpoint, found = runner.convert(recipe, case.cut)
                return found | runner.figures(checkpoint, recipe.evaluate)

            def trained(recipe: Recipe, case: Case = case) -> dict[str, Any]:
                checkpoint, found = runner.convert(recipe, case.cut)
                data = recipe.train.data or args.train_data or args.data
                out, about = runner.train(checkpoint, data, recipe)
                size = {name: found[name] for name in ("total", "active", "share")}
                return size | about | runner.figures(out, recipe.evaluate)

            lines.row(key | {"train_tokens": 0}, converted)
            if not args.train_tokens:
                continue
            for one in training(recipe, case.name, args.learning_rate, args.train_tokens):
                rates = f"{one.train.learning_rate:g}/{one.train.new_learning_rate:g}"
                about = {"train_tokens": args.train_tokens, "rates": rates}
                lines.row(key | about, lambda one=one: trained(one))
    print(table(lines.rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Return a markdown table with a line per case, training tokens and learning rates."""
    heads = ["case", "trained on", "rates", "seeds", "share", "gap", "KL", "s", "GB"]
    lines = [heads, ["---"] * len(heads)]
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["train_tokens"], row.get("rates", "–")), []).append(row)
    for (case, tokens, rates), own in groups.items():
        peaks = [row["peak_gb"] for row in own if row["peak_gb"] is not None]
        share, seeds = f"{own[0]['share']:.1%}", str(len({row["seed"] for row in own}))
        lines.append(
            [case, f"{tokens:,}", rates, seeds, share]
            + [spread([row[name] for row in own]) for name in ("gap", "kl")]
            + [spread([row["seconds"] for row in own], digits=0), spread(peaks, digits=1)]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(values: list[float], digits: int = 3) -> str:
    """Format the mean, and half the range of several values."""
    if not values:
        return "–"
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
