"""`molcli data`: write and prepare text before a run."""

import typer

from molcli.cli.data.cache_logits import cache_logits
from molcli.cli.data.sample import sample
from molcli.cli.data.tokenize import tokenize

app = typer.Typer(
    help="Sample text from a parent, tokenise it once, cache a parent's predictions.",
    no_args_is_help=True,
)
app.command("sample")(sample)
app.command("tokenize")(tokenize)
app.command("cache-logits")(cache_logits)
