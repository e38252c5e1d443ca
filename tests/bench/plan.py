"""Compare the KL that `molcli plan` forecasts with the KL of real conversions.

    python tests/bench/plan.py PARENT --data train.jsonl [--heldout heldout.jsonl] --out lines.jsonl

Converts the parent with different shapes, numbers of tokens and layers; `--case name:key=value,...`
gives others. Each conversion is one JSON line with its predictors and the KL right after
conversion, on --heldout, or else on the rows that calibration held out.

The last line has Spearman's rank correlation between measured and forecast KL, for three sets of
constants: those in molcli/estimate/forecast.py, those fitted to these conversions, and those fitted
to all conversions but the forecast one. The bar is 0.9. If the last correlation is the best, copy
`constants` into forecast.py. With --out, lines are appended to a file, and rows that it already has
are not run again.
"""

import argparse
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from conversions import Case, ConversionRunner
from json_lines import JsonLines, machine
from upcycle import chosen

from molcli.config.sections import Recipe
from molcli.estimate.cost import conversion_cost
from molcli.estimate.forecast import (
    FORECAST,
    Predictors,
    compute_predictors,
    fit_forecast,
    layer_spectra,
    leave_one_out_forecasts,
    rank_correlation,
)
from molcli.estimate.gpus import GPUS
from molcli.families.parent import Parent, open_parent
from molcli.model.configuration_mol import MoLConfig

BAR = 0.9
FEWEST = 3  # conversions for a rank correlation


def matrix(parent: Parent, tokens: int) -> list[Case]:
    """Return variations of a default conversion, with sizes relative to the parent's."""
    dense = parent.mol_config_kwargs()
    unit, d_ff, layers = dense["head_dim"], dense["intermediate_size"], dense["num_hidden_layers"]
    width = max(1, round(dense["hidden_size"] / 3 / unit)) * unit
    wide = min(width + unit, dense["hidden_size"] // unit * unit)
    thin = max(width - unit, unit)
    third = d_ff // 3

    def case(name: str, *options: str, shape: tuple[int, int] = (width, third)) -> Case:
        keys = f"upcycle.d_thin={shape[0]}", f"upcycle.d_ff_thin={shape[1]}"
        heads = max(1, round(dense["num_attention_heads"] / 3))
        fixed = f"upcycle.num_heads_thin={heads}", f"calibrate.tokens={tokens}"
        return Case(name, (*fixed, *keys, *options))

    def split(preset: str, *options: str) -> Case:
        """A preset, whose shared and routed blocks have different shapes."""
        name = " ".join((preset, *(text.removeprefix("upcycle.") for text in options)))
        return Case(name, (f"upcycle.preset={preset}", f"calibrate.tokens={tokens}", *options))

    upper = list(range(layers // 2, layers))
    return [
        case("base"),
        case("wide", shape=(wide, third)),
        case("thin", shape=(thin, third)),
        case("neurons", shape=(width, 2 * third)),
        case("few-neurons", shape=(width, max(1, third // 2))),
        case("wide-few-neurons", shape=(wide, max(1, third // 2))),
        case("thin-neurons", shape=(thin, third * 5 // 4)),
        case("wide-neurons", shape=(wide, 2 * third)),
        case("17-blocks", "upcycle.num_blocks=17"),
        case("5-blocks", "upcycle.num_blocks=5"),
        case("top-1", "upcycle.top_k=1"),
        case("top-3", "upcycle.top_k=3"),
        case("two-shared", "upcycle.num_blocks=10", "upcycle.num_shared_blocks=2"),
        case("half-the-tokens", f"calibrate.tokens={tokens // 2}"),
        case("upper-half", f"upcycle.layers={upper}"),
        case("every-other", f"upcycle.layers={list(range(1, layers, 2))}"),
        case("upper-half-thin", f"upcycle.layers={upper}", shape=(thin, third)),
        split("quality"),
        split("balanced"),
        split("fast"),
        split("balanced", "upcycle.num_blocks=17"),
        split("balanced", "upcycle.top_k=2"),
    ]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parent")
    parser.add_argument("--data", required=True)
    parser.add_argument("--heldout")
    parser.add_argument(
        "--tokens", type=int, default=98_304, help="calibration tokens of most cases"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="of all cases")
    parser.add_argument("--case", action="append", help="in place of the matrix")
    parser.add_argument("--only", help="names of cases, a,b")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="where the scratch folder is made")
    args = parser.parse_args(words)

    parent, lines = open_parent(args.parent), JsonLines(args.out)
    cases = matrix(parent, args.tokens)
    if args.case:
        cases = [Case.parse(text) for text in args.case]
    names = chosen([case.name for case in cases], args.only)
    runs = [(c, c.recipe(None, args.set, args.seed)) for c in cases if c.name in names]
    with TemporaryDirectory(prefix="molcli-bench-", dir=args.work) as folder:
        runner = ConversionRunner(parent, args.data, Path(folder), {"heldout": args.heldout})
        spectra: dict[int, torch.Tensor] = {}
        for case, recipe in runs:
            settings = [*args.set, *case.overrides]
            key = {"parent": args.parent, "case": case.name, "seed": args.seed}
            lines.row(key | {"settings": settings}, partial(figures, runner, recipe, spectra))
    rows = [row for row in lines.known() or lines.rows if "predictors" in row]
    rows = [row for row in rows if row["parent"] == args.parent]
    if len(rows) >= FEWEST:
        lines.add(summary(rows))


def figures(
    runner: ConversionRunner, recipe: Recipe, spectra: dict[int, torch.Tensor]
) -> dict[str, Any]:
    """One conversion. spectra: filled at the first call, and the same for all: a calibration on
    fewer tokens has seen fewer directions, and loses less by its own account."""
    if not spectra:
        calibration, _ = runner.calibration(recipe)
        layers = list(range(runner.parent.config.num_hidden_layers))
        spectra |= layer_spectra(runner.parent, calibration.moment, layers)
    checkpoint, found = runner.convert(recipe)
    config = MoLConfig.from_pretrained(checkpoint)
    tokens = found["calibration_tokens"]
    predictors = compute_predictors(config, spectra, tokens)
    cost = conversion_cost(config, tokens, recipe.calibrate.heldout_tokens, GPUS["h100"])
    return {
        **found["receipt"],
        **found,
        **runner.figures(checkpoint, recipe.evaluate),
        "predictors": asdict(predictors),
        "forecast": round(FORECAST.kl(predictors), 4),
        "expected": {
            "h100_seconds": round(cost.seconds, 1),
            "h100_gb": round(cost.memory / 1e9, 2),
        },
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return rank correlations over all rows."""
    settings = [Predictors(**row["predictors"]) for row in rows]
    kl = [row["kl"] for row in rows]
    fitted = fit_forecast(settings, kl)
    left_out = leave_one_out_forecasts(settings, kl)
    ranks = {
        "in_code": rank_correlation([FORECAST.kl(s) for s in settings], kl),
        "fitted": rank_correlation([fitted.kl(s) for s in settings], kl),
        "left_out": rank_correlation(left_out, kl),
    }
    return {
        "conversions": len(rows),
        "rank_correlation": {name: round(value, 3) for name, value in ranks.items()},
        "bar": BAR,
        "constants": [round(value, 4) for value in fitted.constants],
        "left_out": {
            row["case"]: [round(k, 3), round(f, 3)]
            for row, k, f in zip(rows, kl, left_out, strict=True)
        },
    } | machine()


if __name__ == "__main__":
    main()
