"""Measure conversions beside what one would do otherwise, after conversion and after training.

    python tests/bench/upcycle.py PARENT --recipe smollm2-135m --data wiki.jsonl=1 \\
        --data docs.jsonl=2 --heldout wiki=heldout-wiki.jsonl --heldout unseen=unseen.jsonl \\
        --only fitted,unrouted,depth_pruned,width_pruned --train-tokens 30M --seeds 0,1,2 \\
        --learning-rate depth_pruned=6e-4,1e-3 --out lines.jsonl
    python tests/bench/upcycle.py --table lines.jsonl other.jsonl

Without --case, the cases are: `fitted`, the recipe's shape in all layers; `unrouted`, as many
active weights with nothing routed; the parent's parts `depth_pruned` and `width_pruned`
(tests/bench/pruned.py), with as many active parameters as the recipe's shape; `75%` and `paper`,
two presets; and, as thin blocks, the baselines `pca`, `svd`, `random` and `skipped`.

Prints one JSON line per conversion and per training, and at the end a markdown table with means
over seeds and half of their range. KL(parent || model) on each --heldout text, in nats a token, as
in `molcli eval`; recall and greedy continuations on the first one. s: seconds of training, or of
conversion. receipt: figures on the rows that calibration held out. With --out, lines are appended
to a file, and rows that it already has are not run again. Processes with different --out may share
a GPU.
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

BASELINES = "pca", "svd", "random", "skipped"
PRUNED = "depth_pruned", "width_pruned"


def default_cases() -> list[Case]:
    """Return the cases for any parent."""
    texts = [
        "fitted:",
        "unrouted:num_blocks=1",
        *(f"{method}:method={method}" for method in PRUNED),
        "75%:preset=quality",
        "paper:preset=paper",
        *(f"{method}:preset=paper,method={method}" for method in BASELINES),
    ]
    return [Case.parse(text) for text in texts]


def parse_sources(texts: list[str]) -> str | dict[str, float]:
    """Return the source or the sources by weight of `--data a.jsonl=0.5`."""
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    pairs = (text.rpartition("=") if "=" in text else (text, "=", "1") for text in texts)
    return {source: float(weight) for source, _, weight in pairs}


def parse_heldout(texts: list[str]) -> dict[str, str]:
    """Return the texts by name of `--heldout name=path`; without a name, that of the file."""
    pairs = (text.partition("=") if "=" in text else (Path(text).stem, "", text) for text in texts)
    return {name: path for name, _, path in pairs}


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that this benchmark shares with the one of Gated DeltaNet."""
    parser.add_argument("parent")
    parser.add_argument(
        "--data", required=True, action="append", help="text to calibrate on, and train on; a=0.5"
    )
    parser.add_argument(
        "--heldout", required=True, action="append", help="name=text, for evaluation only"
    )
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", help="names of cases, a,b")
    parser.add_argument("--recipe", help="of all cases")
    parser.add_argument("--set", action="append", default=[], help="of all cases")
    parser.add_argument("--train-tokens", type=parse_count, default=0)
    parser.add_argument(
        "--train-data", action="append", help="where a case has no train.data, else --data"
    )
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
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["--table"]:
        print(table([row for file in words[1:] for row in JsonLines(Path(file)).known()]))
        return
    args = arguments(words)
    parent, lines = open_parent(args.parent), JsonLines(args.out)
    data = parse_sources(args.data)
    train_data = data if args.train_data is None else parse_sources(args.train_data)
    cases = default_cases()
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
        runner = ConversionRunner(parent, data, Path(folder), parse_heldout(args.heldout))
        for case, seed, recipe in runs:
            settings = [f"recipe={args.recipe}", *args.set, *case.overrides]
            key = {"parent": args.parent, "case": case.name, "seed": seed, "settings": settings}

            def converted(case: Case = case, recipe: Recipe = recipe) -> dict[str, Any]:
                checkpoint, found = runner.convert(recipe, case.cut)
                return found | runner.figures(checkpoint, recipe.evaluate)

            def trained(recipe: Recipe, case: Case = case) -> dict[str, Any]:
                checkpoint, found = runner.convert(recipe, case.cut)
                text = recipe.train.data or train_data
                out, about = runner.train(checkpoint, text, recipe)
                size = {name: found[name] for name in ("total", "active", "share")}
                return size | about | runner.figures(out, recipe.evaluate, generate=True)

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
    texts = list(dict.fromkeys(name for row in rows for name in row.get("texts", {})))
    heads = ["case", "trained on", "rates", "seeds", "total", "share"]
    heads += [f"KL {name}" for name in texts] + ["gap", "same", "recall", "greedy", "s", "GB"]
    lines = [heads, ["---"] * len(heads)]
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["train_tokens"], row.get("rates", "–")), []).append(row)
    for (case, tokens, rates), own in groups.items():
        peaks = [row["peak_gb"] for row in own if row["peak_gb"] is not None]
        share, seeds = f"{own[0]['share']:.1%}", str(len({row["seed"] for row in own}))
        lines.append(
            [case, f"{tokens:,}", rates, seeds, f"{own[0]['total'] / 1e6:.0f}M", share]
            + [spread([row["texts"][name]["kl"] for row in own]) for name in texts]
            + [spread([row[name] for row in own]) for name in ("gap", "agreement")]
            + [recall(own), spread([r["greedy"] for r in own if r.get("greedy")], digits=1)]
            + [spread([row["seconds"] for row in own], digits=0), spread(peaks, digits=1)]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def recall(rows: list[dict[str, Any]]) -> str:
    """Format the model's recall in percent, by distance, as the mean over rows."""
    found = [row["recall"] for row in rows if row.get("recall")]
    if not found:
        return "–"
    means = (sum(r[distance][0] for r in found) / len(found) for distance in found[0])
    return " / ".join(f"{100 * mean:.0f}" for mean in means)


def spread(values: list[float], digits: int = 3) -> str:
    """Format the mean, and half the range of several values."""
    if not values:
        return "–"
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
