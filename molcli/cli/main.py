"""The `molcli` command: its subcommands, and the one place that turns an error into words."""

import sys
from typing import Annotated

import typer

from molcli import __version__
from molcli.cli.bench import bench
from molcli.cli.calibrate import calibrate
from molcli.cli.convert import convert
from molcli.cli.data import app as data
from molcli.cli.demo import demo
from molcli.cli.evaluate import evaluate
from molcli.cli.failures import explain
from molcli.cli.init import init
from molcli.cli.inspect import inspect
from molcli.cli.launch import Told
from molcli.cli.plan import plan
from molcli.cli.train import train
from molcli.cli.upcycle import upcycle

app = typer.Typer(
    name="molcli",
    help="Turn a dense language model into a Mixture of Layers model, train it, look inside.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"molcli {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of `molcli` itself."""


app.command("demo")(demo)
app.command("upcycle")(upcycle)
app.command("plan")(plan)
app.command("convert")(convert)
app.command("train")(train)
app.command("inspect")(inspect)
app.command("eval")(evaluate)
app.command("bench")(bench)
app.command("init")(init)
app.command("calibrate")(calibrate)
app.add_typer(data, name="data")


def main() -> None:
    """Run the command line.

    Exit status: 0 done, 1 a bug, 2 the user's input, 130 interrupted (143 by SIGTERM).
    """
    try:
        app()
    except SystemExit as stop:
        # typer turns an interrupt into this status without a word.
        if stop.code == 130 and not isinstance(stop, Told):
            explain(KeyboardInterrupt())
        raise
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(explain(error))
