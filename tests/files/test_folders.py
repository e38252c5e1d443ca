"""An output folder appears complete or not at all."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from molcli.errors import MolError
from molcli.files.folders import lock_for, output_folder, refuse_existing
from molcli.files.hidden_folders import PARTIAL, SCRATCH, hidden_path, make_hidden

# A run that reports when it has written half of its output, and then waits for its input to end.
CHILD = """
import sys
from molcli.files.folders import output_folder
with output_folder(sys.argv[1]) as staging:
    (staging / "config.json").write_text("{}")
    (staging / "half").mkdir()
    print("written", flush=True)
    sys.stdin.read()
"""


def start_child(path: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "written\n"
    return child


def finish(child: subprocess.Popen[str], number: signal.Signals) -> None:
    child.send_signal(number)
    child.communicate()


@pytest.mark.parametrize("existing", [False, True])
def test_success_renames(tmp_path: Path, existing: bool) -> None:
    out = tmp_path / "a" / "out"
    if existing:
        out.mkdir(parents=True)
    with output_folder(out) as staging:
        (staging / "config.json").write_text("{}")
        (staging / "sub").mkdir()
        (staging / "sub" / "x").write_text("x")
        assert not out.exists() or not any(out.iterdir())
        assert out.parent.joinpath(".out.partial") in staging.parents
    assert (out / "sub" / "x").read_text() == "x"
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, BlockingIOError])
def test_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with output_folder(tmp_path / "out") as staging:
            (staging / "config.json").write_text("{}")
            raise error

    with pytest.raises(error):
        write()
    assert not any(tmp_path.iterdir())


def test_killed_run_leaves_no_output_and_is_cleaned_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(start_child(out), signal.SIGKILL)
    assert not out.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == [".out.partial"]
    with output_folder(out) as staging:
        assert not any(staging.iterdir())
        (staging / "new").write_text("")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in out.iterdir()] == ["new"]


def test_a_path_that_a_running_process_writes_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = start_child(out)
    with pytest.raises(MolError, match="another run is writing"), output_folder(out):
        pytest.fail("entered")
    child.communicate("")  # closes its input, so that it finishes
    assert child.returncode == 0
    assert (out / "config.json").exists()
    assert (out / "half").is_dir()


def test_existing_paths_are_refused_and_unchanged(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    file.write_text("mine")
    for path in (folder, file):
        with pytest.raises(MolError, match="exists and is not empty"), output_folder(path):
            pytest.fail("entered")
    assert (folder / "mine").read_text() == file.read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    with (
        pytest.raises(MolError, match=r"needs 0.00 GB, and .* has 0.00 GB free"),
        output_folder(tmp_path / "out", need_bytes=1000),
    ):
        pytest.fail("entered")
    assert not any(tmp_path.iterdir())
    with output_folder(tmp_path / "out", need_bytes=999):
        pass
    assert (tmp_path / "out").is_dir()


def test_symlink_to_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with output_folder(tmp_path / "link") as staging:
        (staging / "x").write_text("x")
    assert (tmp_path / "real" / "x").exists()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("kind", ["link", "folder", "file"])
def test_what_is_not_ours_at_the_hidden_name_is_refused_and_unchanged(
    tmp_path: Path, kind: str
) -> None:
    mine, hidden = tmp_path / "mine", tmp_path / ".out.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    if kind == "link":
        hidden.symlink_to(mine)
    elif kind == "folder":
        mine.rename(hidden)
    else:
        hidden.write_text("mine")
    before = sorted((str(path), path.is_symlink()) for path in tmp_path.rglob("*"))
    with (
        pytest.raises(MolError, match=r"\.out\.partial is in the way") as refused,
        output_folder(tmp_path / "out"),
    ):
        pytest.fail("entered")
    assert f"move {hidden}" in refused.value.hint
    assert sorted((str(path), path.is_symlink()) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["link", "second name", "content", "folder"])
@pytest.mark.parametrize("complete", [False, True])
def test_a_mark_that_molcli_did_not_make_is_none(tmp_path: Path, kind: str, complete: bool) -> None:
    mine, hidden = tmp_path / "mine", tmp_path / ".out.partial"
    mine.write_text("")
    hidden.mkdir()
    (hidden / "thesis.txt").write_text("mine")
    if kind == "link":
        (hidden / ".molcli").symlink_to(mine)
    elif kind == "second name":
        os.link(mine, hidden / ".molcli")
    elif kind == "content":
        (hidden / ".molcli").write_text("mine")
    else:
        (hidden / ".molcli").mkdir()
    if complete:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("{}")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(MolError), output_folder(tmp_path / "out"):
        pytest.fail("entered")
    if complete:
        with pytest.raises(MolError, match="exists and is not empty"):
            refuse_existing(tmp_path / "out")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert (hidden / "thesis.txt").read_text() == "mine"


def test_a_run_that_is_refused_removes_what_was_killed_after_its_last_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    for kind in (PARTIAL, SCRATCH):
        make_hidden(hidden_path(out, kind))
    with pytest.raises(MolError, match="exists and is not empty"):
        refuse_existing(out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    hidden_path(out, SCRATCH).mkdir()
    (hidden_path(out, SCRATCH) / "thesis.txt").write_text("mine")
    with pytest.raises(MolError, match="exists and is not empty"):
        refuse_existing(out)
    assert (hidden_path(out, SCRATCH) / "thesis.txt").read_text() == "mine"


def test_a_signal_in_the_removal_of_the_hidden_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = shutil.rmtree, [KeyboardInterrupt, None]

    def interrupted(path: Path, **options: bool) -> None:
        if (error := left.pop(0) if left else None) is not None:
            raise error
        real(path, **options)

    def fail() -> None:
        with output_folder(tmp_path / "out"):
            monkeypatch.setattr(shutil, "rmtree", interrupted)
            raise ValueError

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not any(tmp_path.iterdir())


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".model.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"), lock_for(tmp_path / "model"):
        pytest.fail("entered")
    assert (tmp_path / "mine").read_text() == "mine"
