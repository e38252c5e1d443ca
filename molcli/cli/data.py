"""`molcli data`: write and prepare text before a run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from molcli import api
from molcli.api.arguments import open_dense
from molcli.cli.options import (
    Data,
    Out,
    Overrides,
    Parent,
    RecipeName,
    ResumableOut,
    data_for,
    recipe_for,
)
from molcli.console import say
from molcli.errors import MolError
from molcli.report.bars import bar

app = typer.Typer(
    help="Sample text from a parent, tokenise it once, cache a parent's predictions.",
    no_args_is_help=True,
)

SampleFile = Annotated[
    Path, typer.Argument(metavar="OUT", help="The .jsonl file to write; must not exist.")
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="SOURCE",
        help="Texts that the parent continues, read as --data is; without, it begins at its BOS.",
    ),
]


@app.command("sample")
def sample(
    parent: Parent,
    out: SampleFile,
    prompts: Prompts = None,
    recipe: RecipeName = None,
    overrides: Overrides = None,
) -> None:
    """Sample text from the parent, for use where there is no data set."""
    values: dict[str, Any] = {} if prompts is None else {"prompts": prompts}
    api.sample(parent, out, recipe=recipe, settings=overrides or (), **values)
    say(f"Text in {out}")


Source = Annotated[
    str,
    typer.Argument(metavar="DATA", help="A .txt, .jsonl or .parquet file, or hf://org/name."),
]
TokenizerOption = Annotated[
    str,
    typer.Option(
        "--tokenizer", "-t", metavar="CKPT", help="The folder or Hub id of the model to train."
    ),
]
Limit = Annotated[
    int | None, typer.Option("--tokens", min=1, metavar="N", help="Write only the first N tokens.")
]


@app.command("tokenize")
def tokenize(source: Source, out: Out, tokenizer: TokenizerOption, tokens: Limit = None) -> None:
    """Tokenise text once, for many runs: `--data OUT` maps the tokens into memory."""
    say(f"{_write_tokens(source, out, tokenizer, tokens):,} tokens in {out}")


def _write_tokens(source: str, out: Path, tokenizer: str, limit: int | None) -> int:
    """Write the folder and return its number of tokens."""
    from molcli.data.documents import read_documents
    from molcli.data.token_folder import write_token_folder
    from molcli.data.tokenizer import find_tokenizer
    from molcli.data.tokenizer import tokenize as encode
    from molcli.files.folders import refuse_existing

    refuse_existing(out)
    found = find_tokenizer(tokenizer)
    with bar("tokenising") as progress:
        # Ids beyond the tokenizer's are left to the model that reads them: many models pad their
        # vocabulary.
        documents = encode(
            read_documents(source), found, vocab_size=2**31, limit=limit, progress=progress
        )
        return write_token_folder(documents, out, found, source=source)


TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="Tokens to keep at a position.")]
CacheResume = Annotated[
    bool, typer.Option("--resume", help="Add the predictions that a stopped run did not reach.")
]


@app.command("cache-logits")
def cache_logits(
    parent: Parent,
    out: ResumableOut,
    data: Data = None,
    top_k: TopK = 64,
    recipe: RecipeName = None,
    overrides: Overrides = None,
    resume: CacheResume = False,
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
    from molcli.data.logits import check_cache_folder

    check_cache_folder(out, resume=resume)
    dense = open_dense(parent)
    from molcli.stages.cache_logits import cache_logits as run

    with bar("caching") as progress:
        tokens = run(dense, text, config, out, top_k=top_k, resume=resume, progress=progress)
    say(f"Predictions for {tokens:,} tokens in {out}")
