"""A fork of a warmed process ends as the command does."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Forked


def end(how: str) -> None:
    """What a test's command does, in the child."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "spin":
        while True:
            pass
    if how == "wait":
        time.sleep(60)
    if how == "fill":
        filled = [bytes(1) * 2**26 for _ in range(64)]
        assert filled
    if how == "bug":
        raise ZeroDivisionError("a bug")
    if how == "environment":
        print(sorted({"HOME", "USER", "OMP_NUM_THREADS"} & os.environ.keys()), Path.cwd())


def test_status_and_output_are_the_commands(forked: Forked, tmp_path: Path) -> None:
    version = forked.run(["--version"], tmp_path)
    assert version.code == 0 and version.signal is None and "molcli" in version.stdout
    refused = forked.run(["plan", tmp_path / "missing"], tmp_path)
    assert refused.code == 2 and "error:" in refused.stderr and not refused.stdout
    unknown = forked.run(["fly"], tmp_path)
    assert unknown.code == 2 and "No such command" in unknown.stderr


@pytest.mark.parametrize(
    "how, fields, expected",
    [
        ("kill", {}, {"code": 137, "signal": 9, "over": None}),
        ("spin", {"seconds": 0.2}, {"signal": 9, "over": "seconds"}),
        ("wait", {"seconds": 0.02}, {"signal": 9, "over": "seconds"}),
        ("wait", {"signal_after": (0.01, signal.SIGTERM)}, {"code": 143, "over": None}),
        ("fill", {"memory": 2**30}, {"signal": 9, "over": "memory"}),
        ("bug", {}, {"code": 1, "signal": None}),
    ],
)
def test_an_ending_is_reported(
    forked: Forked, tmp_path: Path, how: str, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    done = forked.run(["--version"], tmp_path, setup="tests.test_forked:end", payload=how, **fields)
    assert {name: getattr(done, name) for name in expected} == expected


def test_a_child_has_its_own_environment_and_folder(forked: Forked, tmp_path: Path) -> None:
    done = forked.run(
        ["--version"],
        tmp_path,
        env={"HOME": str(tmp_path)},
        setup="tests.test_forked:end",
        payload="environment",
    )
    assert done.stdout.startswith(f"['HOME', 'OMP_NUM_THREADS'] {tmp_path}\n")
    assert forked.run(["--version"], tmp_path).stdout.startswith("molcli")
