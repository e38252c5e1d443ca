"""`molcli data tokenize`: text to memory-mapped tokens."""

from pathlib import Path
from typing import Annotated

import typer

from molcli.cli.bars import bar
from molcli.cli.options import Out

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
    int | None, typer.Option("--tokens", min=1, metavar="N", help="Only the first so many tokens.")
]


def tokenize(source: Source, out: Out, tokenizer: TokenizerOption, tokens: Limit = None) -> None:
    """Tokenise text once, for many runs: `--data OUT` then reads it without loading it."""
    typer.echo(f"{run_tokenize(source, out, tokenizer, tokens):,} tokens in {out}")


def run_tokenize(source: str, out: Path, tokenizer: str, limit: int | None) -> int:
    """Writes the folder under a bar; returns its number of tokens."""
    from molcli.data.documents import read_documents
    from molcli.data.token_folder import write_token_folder
    from molcli.data.tokenizer import find_tokenizer
    from molcli.data.tokenizer import tokenize as encode

    found = find_tokenizer(tokenizer)
    with bar("tokenising") as progress:
        # Ids past the tokenizer's are left to the model that reads them: many pad their vocabulary.
        documents = encode(
            read_documents(source), found, vocab_size=2**31, limit=limit, progress=progress
        )
        return write_token_folder(documents, out, found, source=source)
