"""The command line: light before work starts, and every error in words with its exit status."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from molcli import __version__
from molcli.cli import main as command
from molcli.errors import Interrupted, MolError

COMMANDS = [
    "demo",
    "upcycle",
    "convert",
    "plan",
    "train",
    "inspect",
    "eval",
    "bench",
    "init",
    "data",
    "calibrate",
]
CHECKED = "MOLCLI_VERSIONS_CHECKED"
HEAVY = ["torch", "transformers", "datasets", "accelerate", "numpy"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`molcli ...` in a process of its own; its last line of stdout names heavy imports."""
    program = (
        "import atexit, sys\n"
        f"heavy = lambda: print('heavy:', [m for m in {HEAVY} if m in sys.modules])\n"
        "atexit.register(heavy)\n"
        "from molcli.cli.main import main\n"
        f"sys.argv = ['molcli', *{list(arguments)}]\n"
        "main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Exit status and stderr of `molcli ...` in this process."""
    monkeypatch.setattr(sys, "argv", ["molcli", *arguments])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, status",
    [
        (["--help"], 0),
        (["--version"], 0),
        (["upcycle", "--help"], 0),
        (["upcycle", "PARENT"], 2),
        (["upcycle", "PARENT", "OUT", "--set", "upcycle.d_thinn=1"], 2),
        (["upcycle", "PARENT", "OUT", "--recipe", "nowhere.yaml"], 2),
        (["nothing"], 2),
    ],
    ids=str,
)
def test_help_and_errors_in_arguments_import_nothing_heavy(
    arguments: list[str], status: int
) -> None:
    done = run(*arguments)
    assert done.returncode == status
    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert "Traceback" not in done.stderr


def test_completion_is_light_and_knows_commands_recipes_and_keys() -> None:
    def complete(words: str, position: int) -> list[str]:
        done = run(_MOLCLI_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(position))
        *lines, heavy = done.stdout.splitlines()
        assert heavy == "heavy: []"
        return lines

    assert set(COMMANDS) <= set(complete("molcli ", 1))
    assert complete("molcli upcycle --recipe dem", 3) == ["demo", "demo-gpu"]
    widths = ["upcycle.d_thin=", "upcycle.d_thin_shared="]
    assert complete("molcli upcycle --set upcycle.d_t", 3) == widths


def test_the_shell_gets_its_completion_script() -> None:
    done = run(_MOLCLI_COMPLETE="source_bash")
    assert "complete -o default -F _molcli_completion molcli" in done.stdout


def test_version() -> None:
    done = run("--version")
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "heavy: []"
    assert lines[0] == f"molcli {__version__}"
    names = ["molcli", "Python", "torch", "triton", "transformers", "fla-core"]
    assert [line.split()[0] for line in lines] == names
    assert f"torch {version('torch')}" in lines


@pytest.mark.parametrize(
    "arguments, environment, warnings",
    [
        (["upcycle", "PARENT", "OUT", "--recipe", "nowhere.yaml"], {}, 1),
        (["data", "tokenize", "DATA"], {}, 1),
        (["upcycle", "PARENT", "OUT", "--recipe", "nowhere.yaml"], {"RANK": "0"}, 1),
        (["upcycle", "PARENT", "OUT", "--recipe", "nowhere.yaml"], {"RANK": "1"}, 0),
        (["upcycle", "PARENT", "OUT", "--recipe", "nowhere.yaml"], {CHECKED: "1"}, 0),
        (["upcycle", "--help"], {}, 0),
        (["upcycle", "-h"], {}, 0),
        (["--help"], {}, 0),
        (["--version"], {}, 0),
    ],
    ids=str,
)
def test_versions_that_were_not_tested_are_told_once(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], warnings: int
) -> None:
    # Found before the real metadata, as if the installed pytest were too new.
    about = tmp_path / f"molcli-{__version__}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: molcli\nVersion: {__version__}\n"
        "Requires-Dist: pytest<2,>=1\n"
    )
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    done = run(*arguments, **{"PYTHONPATH": path, CHECKED: ""} | environment)
    told = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(told) == warnings
    assert all(line.endswith("try: pip install 'pytest>=1,<2'") for line in told)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["molcli", name, "--help"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 0
    assert name in capsys.readouterr().out


def test_the_users_error_is_told_in_three_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = stopped(
        monkeypatch, capsys, "upcycle", "PARENT", "OUT", "--set", "upcycle.layers=[0, x]"
    )
    assert status == 2
    assert text.splitlines() == [
        "error: `upcycle.layers` is [0, 'x']",
        "allowed: all, middle, auto or a list of integers such as [0, 2]",
    ]
    status, text = stopped(monkeypatch, capsys, "upcycle", "P", "O", "--set", "upcyle.layers=all")
    assert text.splitlines()[-1] == "try: upcycle"


@pytest.mark.parametrize(
    "error, status, expected",
    [
        (MolError("a [red] one", allowed="[0, 2]", hint="x"), 2, "error: a [red] one\nallowed: "),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(130), 130, "interrupted"),
        (Interrupted(15, "step 3 is saved", "molcli train X --resume"), 143, "resume: molcli tr"),
        (ZeroDivisionError("by zero"), 1, "bug: ZeroDivisionError: by zero"),
        (MemoryError(), 1, "error: out of memory"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "error: Permission denied: /x/y"),
        (OSError(28, "No space left on device", "/x/y"), 2, "try: free some space"),
        (FileExistsError(17, "File exists", "/x/y"), 2, "error: File exists: /x/y"),
        (RuntimeError("Symlink loop from '/x'"), 2, "error: Symlink loop from '/x'"),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
            2,
            "error: a file is not text in UTF-8",
        ),
        (OSError(24, "Too many open files"), 1, "error: Too many open files"),
        (OSError("a message of some library"), 1, "bug: OSError"),
    ],
    ids=str,
)
def test_what_a_command_raises_becomes_words_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    expected: str,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(command, "app", fail)
    code, text = stopped(monkeypatch, capsys)
    assert code == status
    assert expected in text
    assert "Traceback" not in text
    monkeypatch.setenv("MOLCLI_DEBUG", "1")
    if status == 1:
        assert "Traceback" in stopped(monkeypatch, capsys)[1]


def test_an_interrupt_inside_a_command_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str, overrides: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("molcli.config.recipe.load_recipe", interrupted)
    code, text = stopped(monkeypatch, capsys, "init", "demo", "OUT")
    assert code == 130
    assert "interrupted" in text


def test_train_without_data_says_where_text_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, text = stopped(monkeypatch, capsys, "train", str(tmp_path), str(tmp_path / "out"))
    assert code == 2
    assert "molcli data sample" in text
