"""`molcli data cache-logits`: write a parent's predictions to disk."""

from typing import Annotated

import typer

from molcli.api.arguments import open_dense
from molcli.cli.options import Data, Out, Overrides, Parent, RecipeName, data_for, recipe_for
from molcli.errors import MolError
from molcli.report.bars import bar

TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="Tokens to keep at a position.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Add the predictions that a stopped run did not reach.")
]


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

    The recipe's train section sets how much of the text is used, and how it is packed.
    """
    config = recipe_for(recipe, overrides).train
    text = data_for(data) or config.data
    if text is None:
        raise MolError(
            "there is no text to predict", allowed="--data SOURCE, or train.data in the recipe"
        )
    dense = open_dense(parent)
    from molcli.stages.cache_logits import cache_logits as run

    with bar("caching") as progress:
        tokens = run(dense, text, config, out, top_k=top_k, resume=resume, progress=progress)
    typer.echo(f"Predictions for {tokens:,} tokens in {out}")
