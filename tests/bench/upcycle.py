"""Measure conversions beside what one would do otherwise, after conversion and after training.

    python tests/bench/upcycle.py PARENT --recipe smollm2-135m --data wiki.jsonl=1 \\
        --data docs.jsonl=2 --heldout wiki=heldout-wiki.jsonl --heldout unseen=unseen.jsonl \\
        --only fitted,unrouted,depth_pruned,width_pruned --train-tokens 30M --seeds 0,1,2 \\
        --learning-rate depth_pruned=6e-4,1e-3 --speed --out lines.jsonl
    python tests/bench/upcycle.py --table lines.jsonl other.jsonl

Without --case, the cases are: `fitted`, the recipe's shape in all layers; `unrouted`, as many
active weights with nothing routed; the parent's parts `depth_pruned` and `width_pruned`
(tests/bench/pruned.py), with as many active parameters as the recipe's shape; `75%` and `paper`,
two presets; and, as thin blocks, the baselines `pca`, `svd`, `random` and `skipped`.

Prints one JSON line per conversion and per training, and at the end a markdown table with means
over seeds and half of their range. KL(parent || model) on each --heldout text, in nats a token, as
in `molcli eval`; recall and greedy continuations on the first one. s: seconds of training, or of
conversion. receipt: figures on the rows that calibration held out. With --speed, tokens a second of
prefill and decoding, of trained models (without --train-tokens, of conversions) and, in a row of
its own, of the parent: as a model of ours, and as transformers runs it.

With --out, lines are appended to a file, and rows that it already has, of the same --data and with
all texts and speeds that are asked for, are not run again. Processes with different --out may
share a GPU, but seconds and speeds then say little.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from conversions import Case, ConversionRunner
from json_lines import JsonLines
from speed import speeds
from table import table

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
    found = {name: path for name, _, path in pairs}
    if len(found) < len(texts):
        sys.exit(f"--heldout: {len(texts)} texts have the names {', '.join(found)}; NAME=PATH")
    return found


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
    parser.add_argument("--speed", action="store_true", help="measure prefill and decoding")
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
    heldout, timed = parse_heldout(args.heldout), args.speed and not args.train_tokens

    def complete(row: dict[str, Any], *, text: dict[str, Any], timed: bool) -> bool:
        same = all(row.get(name, source) == source for name, source in text.items())
        known = heldout.keys() <= row.get("texts", {}).keys()
        return same and known and ("speed" in row or not timed)

    with TemporaryDirectory(prefix="molcli-bench-", dir=args.work) as folder:
        runner = ConversionRunner(parent, data, Path(folder), heldout)
        if args.speed:
            lines.row({"parent": args.parent, "case": "parent", "train_tokens": 0}, runner.dense)
        for case, seed, recipe in runs:
            settings = [f"recipe={args.recipe}", *args.set, *case.overrides]
            key = {"parent": args.parent, "case": case.name, "seed": seed, "settings": settings}

            def converted(case: Case = case, recipe: Recipe = recipe) -> dict[str, Any]:
                checkpoint, found = runner.convert(recipe, case.cut)
                speed = {"speed": speeds(checkpoint)} if timed else {}
                return found | runner.figures(checkpoint, recipe.evaluate) | speed | {"data": data}

            def trained(recipe: Recipe, case: Case = case) -> dict[str, Any]:
                checkpoint, found = runner.convert(recipe, case.cut)
                text = {"data": data, "train_data": recipe.train.data or train_data}
                out, about = runner.train(checkpoint, text["train_data"], recipe)
                size = {name: found[name] for name in ("total", "active", "share")}
                speed = {"speed": speeds(out)} if args.speed else {}
                figures = runner.figures(out, recipe.evaluate, generate=True)
                return size | about | figures | speed | text

            known = partial(complete, text={"data": data}, timed=timed)
            lines.row(key | {"train_tokens": 0}, converted, known)
            if not args.train_tokens:
                continue
            for one in training(recipe, case.name, args.learning_rate, args.train_tokens):
                rates = f"{one.train.learning_rate:g}/{one.train.new_learning_rate:g}"
                about = {"train_tokens": args.train_tokens, "rates": rates}
                text = {"data": data, "train_data": one.train.data or train_data}
                known = partial(complete, text=text, timed=args.speed)
                lines.row(key | about, partial(trained, one), known)
    print(table(lines.rows))


if __name__ == "__main__":
    main()
