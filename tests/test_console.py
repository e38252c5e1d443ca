"""What is printed: names as text, whatever they hold."""

import io
import logging
import os
import subprocess
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from molcli.console import console, note, printable, say

NAMES = [
    ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
    ("a\rb\x08c\x7f", r"a\rb\x08c\x7f"),
    ("\x9b31m", r"\x9b31m"),
    ("safe\u202etxt.exe\u2066", r"safe\u202etxt.exe\u2066"),
    ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
    ("\udcff", r"\udcff"),
    ("[red]x[/red][/]", "[red]x[/red][/]"),
    ("[link=file:///etc]y", "[link=file:///etc]y"),
    (":warning: :boom:", ":warning: :boom:"),
    ("Zürich – 東京 🙂", "Zürich – 東京 🙂"),
    ("no\u00a0break", "no\u00a0break"),
]


@pytest.mark.parametrize("name, shown", NAMES, ids=lambda text: ascii(text)[:20])
def test_a_name_is_printed_as_text_wherever_it_stands(
    name: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printable(name) == shown
    say(name)
    say(name, style="dim")
    note(name)
    told = capsys.readouterr()
    assert told.out == f"{shown}\n" * 2
    assert told.err == f"note: {shown}\n"
    table = Table(name, title=name, caption=name)
    table.add_row(name)
    stream = io.StringIO()
    console(file=stream, width=200).print(table)
    assert stream.getvalue().count(shown) == 4


def test_a_styled_text_cannot_control_the_terminal_either() -> None:
    stream = io.StringIO()
    printer = console(file=stream, width=80, force_terminal=True, color_system="standard")
    printer.print(Text("a\x1b[5mb\x9bc", style="red"))
    assert (
        stream.getvalue()
        == "\x1b[31ma\N{REPLACEMENT CHARACTER}[5mb\N{REPLACEMENT CHARACTER}c\x1b[0m\n"
    )


@given(st.text(st.characters(exclude_categories=[]), max_size=40))
def test_no_text_holds_a_control_character_when_it_is_printed(text: str) -> None:
    shown = printable(text, keep="")
    assert all(c.isprintable() or c.isspace() for c in shown)
    assert not set(shown) & set("\x1b\r\n\x9b\u202e\u2028\x85")
    assert printable(shown, keep="") == shown
    shown.encode()


def run(program: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", f"from molcli.console import *\nguard_streams()\n{program}"],
        capture_output=True,
        env=os.environ | environment,
        check=False,
    )


def test_a_stream_that_cannot_encode_a_character_shows_its_escape() -> None:
    done = run("say('24–29 é'); note('±')", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout == b"24\\u201329 \\xe9\n"
    assert done.stderr == b"note: \\xb1\n"


def test_log_records_and_warnings_of_libraries_are_printable() -> None:
    done = run(
        "import logging, warnings\n"
        "logging.getLogger('a').warning('key %s \x1b[1m', '\\x1b[31m')\n"
        "logging.getLogger('a').warning('%s', ValueError('\\x1b[32m'))\n"
        "warnings.warn('name \\x9b')"
    )
    assert rb"key \x1b[31m \x1b[1m" in done.stderr
    assert rb"name \x9b" in done.stderr
    assert b"\x1b" not in done.stderr
    assert logging.getLogRecordFactory() and warnings.formatwarning


@pytest.mark.parametrize("stream, printed", [("stdout", "say('x' * 99)"), ("stderr", "note('x')")])
def test_a_reader_that_has_gone_ends_the_output_and_not_the_command(
    stream: str, printed: str
) -> None:
    program = (
        "from molcli.console import *\nguard_streams()\nimport sys\n"
        f"for _ in range(10_000): {printed}\n"
        "sys.exit(7)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writing}
    done = subprocess.run([sys.executable, "-c", program], check=False, **streams)
    os.close(writing)
    assert done.returncode == 7
    assert not done.stdout and not done.stderr
