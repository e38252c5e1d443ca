"""`molcli data tokenize`: write text as memory-mapped tokens."""

from pathlib import Path
from typing import Annotated

import typer

from molcli.cli.options import Out
from molcli.report.bars import bar

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


def tokenize(source: Source, out: Out, tokenizer: TokenizerOption, tokens: Limit = None) -> None:
    """Tokenise text once, for many runs: `--data OUT` maps the tokens into memory."""
    typer.echo(f"{_write_tokens(source, out, tokenizer, tokens):,} tokens in {out}")


def _write_tokens(source: str, out: Path, tokenizer: str, limit: int | None) -> int:
    """Write the folder and return its number of tokens."""
    from molcli.data.documents import read_documents
    from molcli.data.documents import tokenize as encode
    from molcli.data.token_folder import write_token_folder
    from molcli.data.tokenizer import find_tokenizer

    found = find_tokenizer(tokenizer)
    with bar("tokenising") as progress:
        # Ids beyond the tokenizer's are left to the model that reads them: many models pad their
        # vocabulary.
        documents = encode(
            read_documents(source), found, vocab_size=2**31, limit=limit, progress=progress
        )
        return write_token_folder(documents, out, found, source=source)
