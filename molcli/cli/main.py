"""The `molcli` command: its subcommands, and the one place that handles errors."""

import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from molcli.cli.bench import bench
from molcli.cli.calibrate import calibrate
from molcli.cli.convert import convert
from molcli.cli.data import app as data
from molcli.cli.demo import demo
from molcli.cli.distributed import ChildExit
from molcli.cli.evaluate import evaluate
from molcli.cli.failures import explain
from molcli.cli.init import init
from molcli.cli.inspect import inspect
from molcli.cli.plan import plan
from molcli.cli.train import train
from molcli.cli.upcycle import upcycle
from molcli.cli.usage import Commands
from molcli.console import guard_streams, note, say
from molcli.ranks import is_main, ranks

_HELP = ["-h", "--help"]
_TERMINATED = 128 + signal.SIGTERM
_CHECKED = "MOLCLI_VERSIONS_CHECKED"  # in the environment: also for the processes of --gpus N

app = typer.Typer(
    name="molcli",
    cls=Commands,
    help="Turn a dense language model into a Mixture of Layers model, train it, measure it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": _HELP},
)


def _version(wanted: bool) -> None:
    if wanted:
        from molcli.config.versions import version_report

        say(version_report())
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions.")
    ] = False,
) -> None:
    """Options of `molcli` itself, before a command."""
    # This runs before the help of a command, too, but not for completion.
    if not set(_HELP) & set(sys.argv):
        _warn_of_untested_versions()


def _warn_of_untested_versions() -> None:
    """One line on stderr, once for all processes of a run."""
    if not is_main() or os.environ.get(_CHECKED):
        return
    os.environ[_CHECKED] = "1"
    from molcli.config.versions import untested_versions

    if found := untested_versions():
        note(found, label="warning")


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave all contexts, which remove what is unfinished."""
    sys.exit(_TERMINATED)


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
    """Run the command line, and exit.

    Exit status: 0 done, 1 a bug or the machine, 2 the user's input, 130 interrupted (143 by
    SIGTERM).
    """
    guard_streams()
    # A process of torchrun gets the signal when another one has failed, which has a status to show.
    if ranks() == 1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except SystemExit as stop:
        # typer turns an interrupt into the first status and prints nothing.
        if stop.code in (130, _TERMINATED) and not isinstance(stop, ChildExit):
            explain(KeyboardInterrupt())
        raise
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(explain(error))
