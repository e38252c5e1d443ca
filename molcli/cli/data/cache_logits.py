"""`molcli data cache-logits`: a parent's predictions on the disk."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molcli.cli.bars import bar
from molcli.cli.options import Data, Out, Overrides, Parent, RecipeName, data_for, recipe_for
from molcli.cli.parents import open_dense
from molcli.config.sections import Data as DataSpec
from molcli.config.sections import TrainConfig
from molcli.errors import MolError

if TYPE_CHECKING:  # torch comes with it
    from molcli.families.parent import Parent as DenseParent

TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="Tokens kept at a position.")]
Resume = Annotated[bool, typer.Option("--resume", help="Add what a stopped run did not reach.")]


def cache_logits(
    parent: Parent,
    out: Out,
    data: Data = None,
    top_k: TopK = 64,
    recipe: RecipeName = None,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Keep the parent's predictions on a text, for `molcli train --logits OUT` without the parent.

    The recipe's train section says how much of the text, and how it is packed.
    """
    settings = recipe_for(recipe, overrides).train
    text = data_for(data) or settings.data
    if text is None:
        raise MolError(
            "there is no text to predict", allowed="--data SOURCE, or train.data in the recipe"
        )
    tokens = run_cache_logits(open_dense(parent), text, settings, out, top_k, resume=resume)
    typer.echo(f"Predictions for {tokens:,} tokens in {out}")


def run_cache_logits(
    parent: "DenseParent",
    data: DataSpec,
    settings: TrainConfig,
    out: Path,
    top_k: int,
    *,
    resume: bool = False,
) -> int:
    """Writes the cache under a bar; returns its number of tokens."""
    from molcli.stages.cache_logits import cache_logits as cache

    with bar("caching") as progress:
        return cache(parent, data, settings, out, top_k=top_k, resume=resume, progress=progress)
